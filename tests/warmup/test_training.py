from __future__ import annotations

from pathlib import Path

import numpy as np

from raydpp.gradients.tokenization import TokenizedExample
from raydpp.warmup.training import Recipe, _collate, examples_together, whole_checkpoints


def test_labels_are_the_response_tokens_alone_and_padding_is_on_the_right() -> None:
    short = TokenizedExample(np.array([5, 6, 7], np.int32), np.array([False, True, False]), 0)
    long = TokenizedExample(np.array([1, 2, 3, 4, 9], np.int32), np.array([False, False, False, True, True]), 0)
    batch = _collate([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [1, 2, 3, 4, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, -100], [-100, -100, -100, 4, 9]]


def test_checkpoints_come_in_the_order_of_steps_without_those_that_are_not_whole(tmp_path: Path) -> None:
    assert whole_checkpoints(str(tmp_path / "nowhere")) == []
    for name, text in {"10": '{"global_step": 10}', "9": '{"global_step": 9}', "11": '{"global', "12": ""}.items():
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-13").mkdir()
    assert [Path(path).name for path in whole_checkpoints(str(tmp_path))] == ["checkpoint-9", "checkpoint-10"]


def test_a_gpu_takes_as_many_examples_at_once_as_are_short_and_divide_a_step() -> None:
    found = {
        (32, 100): 16, (32, 256): 16, (32, 257): 8, (32, 2048): 2, (32, 5000): 1, (12, 100): 4, (7, 9): 1
    }  # fmt: skip
    assert {given: examples_together(*given, "cuda") for given in found} == found
    assert {examples_together(*given, "cpu") for given in found} == {1}


def test_the_last_step_of_an_epoch_may_have_fewer_examples() -> None:
    recipe = Recipe(3, 4, None, 0.1, 4, "float32", 0)
    assert [recipe.steps(examples) for examples in (1, 4, 5, 8)] == [3, 3, 6, 6]
