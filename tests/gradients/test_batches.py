from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from raydpp.gradients.batches import TokenBatches, pad
from raydpp.gradients.tokenization import TokenizedExample

LENGTHS = [5, 90, 7, 30, 5, 31, 200, 6]


def numbered(lengths: list[int]) -> list[TokenizedExample]:
    """Examples whose first token is their place."""
    return [
        TokenizedExample(np.r_[n, np.full(length - 1, 9)].astype(np.int32), np.arange(length) > 0, False)
        for n, length in enumerate(lengths)
    ]


class Model:
    """Gives every example its own first token back, and keeps the batches it was asked for.

    Args:
        memory: How many token positions it has room for.
        error: What it raises beyond that.
        poison: The examples that it raises a ZeroDivisionError on.
    """

    def __init__(self, memory: float = float("inf"), error: Exception | None = None, poison: tuple[int, ...] = ()):
        self.memory, self.poison = memory, poison
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        self.batches: list[list[int]] = []
        self.sizes: list[int] = []

    def __call__(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        places = [int(example.ids[0]) for example in examples]
        self.batches.append(places)
        self.sizes.append(len(examples) * max(len(example.ids) for example in examples))
        if self.sizes[-1] > self.memory:
            raise self.error
        if set(places) & set(self.poison):
            raise ZeroDivisionError("no good\nsecond line")
        places_tensor = torch.tensor(places)
        return {"place": places_tensor.double(), "pair": torch.stack([places_tensor, -places_tensor], 1).bfloat16()}


def test_every_example_is_once_in_a_batch_within_the_budget_the_longest_first() -> None:
    model = Model()
    found = TokenBatches(100).run(numbered(LENGTHS), model)
    assert sorted(place for batch in model.batches for place in batch) == list(range(len(LENGTHS)))
    assert all(size <= 100 or len(batch) == 1 for batch, size in zip(model.batches, model.sizes, strict=True))
    in_turn = [LENGTHS[place] for batch in model.batches for place in batch]
    assert in_turn == sorted(LENGTHS, reverse=True)
    assert len(model.batches) == 4
    assert found.padded_tokens == sum(model.sizes)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_results_keep_the_order_given(budget: int) -> None:
    found = TokenBatches(budget).run(numbered(LENGTHS), Model())
    assert found.reasons == [None] * len(LENGTHS)
    assert found.columns["place"].tolist() == list(range(len(LENGTHS)))
    assert found.columns["pair"].tolist() == [[n, -n] for n in range(len(LENGTHS))]


def test_columns_are_float32_unless_they_are_float64() -> None:
    columns = TokenBatches(100).run(numbered(LENGTHS), Model()).columns
    assert columns["place"].dtype == np.float64
    assert columns["pair"].dtype == np.float32


def test_no_example_is_no_batch() -> None:
    found = TokenBatches(100).run([], Model())
    assert (found.columns, found.reasons, found.padded_tokens) == ({}, [], 0)


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("HIP out of memory"),
    ],
)
def test_a_batch_out_of_memory_is_halved_and_the_budget_is_learned(error: Exception | None) -> None:
    batches, model = TokenBatches(1000), Model(300, error)
    given = numbered([10] * 200)
    found = batches.run(given, model)
    assert found.reasons == [None] * 200
    assert found.columns["place"].tolist() == list(range(200))
    assert model.sizes[:3] == [1000, 500, 250]
    assert model.sizes.count(1000) == 1
    assert batches.budget == 250
    later = Model(300, error)
    batches.run(given, later)
    assert max(later.sizes) == 250


def test_a_budget_within_memory_stays() -> None:
    batches = TokenBatches(300)
    batches.run(numbered([10] * 200), Model(300))
    assert batches.budget == 300


def test_an_example_out_of_memory_alone_gets_a_reason_and_the_others_their_rows() -> None:
    found = TokenBatches(100).run(numbered(LENGTHS), Model(150))
    assert str(found.reasons[6]).startswith("out of memory on 200 tokens alone: a smaller --max-length")
    assert [n for n, reason in enumerate(found.reasons) if reason] == [6]
    assert found.columns["place"].tolist() == [0, 1, 2, 3, 4, 5, 0, 7]


@pytest.mark.parametrize("poison", [(0,), (3,), (7,), (2, 5)])
def test_any_other_error_isolates_the_example_that_raises_it(poison: tuple[int, ...]) -> None:
    batches = TokenBatches(1000)
    found = batches.run(numbered([10] * 8), Model(poison=poison))
    for place, reason in enumerate(found.reasons):
        expected = "the model failed on this example: ZeroDivisionError: no good" if place in poison else None
        assert reason == expected
    assert found.columns["place"].tolist() == [0 if place in poison else place for place in range(8)]
    assert not found.columns["pair"][list(poison)].any()
    assert batches.budget == 1000


def test_an_error_without_words_still_names_itself() -> None:
    found = TokenBatches(10).run(numbered([4]), Model(0, KeyError()))
    assert found.reasons == ["the model failed on this example: KeyError: no message"]
    assert found.columns == {}


def test_a_lost_device_ends_the_job() -> None:
    if not hasattr(torch, "AcceleratorError"):
        pytest.skip("this torch has no AcceleratorError")
    model = Model(0, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        TokenBatches(1000).run(numbered(LENGTHS), model)
    assert len(model.batches) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_example_fault(error: type[BaseException]) -> None:
    def interrupted(_examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        raise error

    with pytest.raises(error):
        TokenBatches(1000).run(numbered(LENGTHS), interrupted)


def test_padding_is_on_the_right_and_no_part_of_a_response() -> None:
    ids, response = pad(numbered([3, 1, 2]), torch.device("cpu"))
    assert ids.tolist() == [[0, 9, 9], [1, 0, 0], [2, 9, 0]]
    assert response.tolist() == [[False, True, True], [False, False, False], [False, True, False]]
    assert ids.dtype == torch.int64


def test_what_ran_out_of_memory_is_done_again_within_the_learned_budget() -> None:
    sizes = []

    def small_memory(given: list[TokenizedExample]) -> dict[str, torch.Tensor]:
        sizes.append(10 * len(given))
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("no")
        return {"a": torch.zeros(len(given))}

    batches = TokenBatches(1000)
    batches.run([TokenizedExample(np.zeros(10, np.int32), np.ones(10, bool), False)] * 200, small_memory)
    assert sizes[:3] == [1000, 500, 250]
    assert max(sizes[2:]) == 250
