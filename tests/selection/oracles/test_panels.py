from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.selection.oracles.panels import Panels, with_room


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 9), rounds=st.integers(1, 12))
def test_what_was_written_is_read_whatever_the_order_and_the_panels(seed: int, width: int, rounds: int) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.rand(20, 40, generator=random)
    panels = Panels(20, torch.float32, torch.device("cpu"), width)
    length = [0] * 20
    for _ in range(rounds):
        rows = torch.randperm(20, generator=random)[: int(torch.randint(1, 20, (), generator=random))]
        start = min(length[row] for row in rows.tolist())  # others are written again
        stop = min(40, start + int(torch.randint(1, 12, (), generator=random)))
        panels.write(rows, start, matrix[rows, start:stop])
        for row in rows.tolist():
            length[row] = max(length[row], stop) if length[row] >= start else length[row]
    for row, end in enumerate(length):
        for start in range(0, end, width):
            stop = min(start + width, end)
            assert torch.equal(panels.read(torch.tensor([row]), start, stop)[0], matrix[row, start:stop])


def test_room_is_made_without_losing_rows() -> None:
    block = torch.arange(6.0).view(3, 2)
    assert with_room(block, 3, 100) is block
    grown = with_room(block, 4, 100)
    assert grown.shape == (100, 2)
    assert torch.equal(grown[:3], block)
    assert with_room(block.to("meta"), 4, 10_000).shape == (1024, 2)  # a device that commits memory grows
    assert with_room(block.to("meta"), 2000, 10_000).shape == (2500, 2)
