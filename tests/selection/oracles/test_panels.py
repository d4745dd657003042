from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.selection.oracles.panels import Panels, with_room


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 9))
def test_what_was_written_is_read_whatever_the_order(seed: int, width: int) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.rand(20, 4 * width, generator=random)
    panels = Panels(20, torch.float32, torch.device("cpu"), width)
    depth = torch.zeros(20, dtype=torch.int64)
    for _ in range(12):
        start = int(depth[torch.randint(0, 20, (), generator=random)])
        if start == 4 * width:
            continue
        rows = (depth == start).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)[: len(rows) // 2 + 1]]
        panels.write(rows, start, matrix[rows, start : start + width])
        depth[rows] += width
    for start in range(0, 4 * width, width):
        rows = (depth > start).nonzero()[:, 0].flip(0)
        if len(rows):
            assert torch.equal(panels.read(rows, start), matrix[rows, start : start + width])
            out = torch.empty(len(rows), 4 * width)
            panels.read(rows, start, out=out[:, start : start + width])
            assert torch.equal(out[:, start : start + width], matrix[rows, start : start + width])


def test_room_is_made_without_losing_rows() -> None:
    block = torch.arange(6.0).view(3, 2)
    assert with_room(block, 3, 100) is block
    grown = with_room(block, 4, 100)
    assert grown.shape == (100, 2)
    assert torch.equal(grown[:3], block)
    assert with_room(block.to("meta"), 4, 10_000).shape == (1024, 2)  # a device that commits memory grows
    assert with_room(block.to("meta"), 2000, 10_000).shape == (2500, 2)
