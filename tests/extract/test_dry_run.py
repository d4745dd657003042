from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.extract import dry_run as module
from raydpp.extract.dry_run import padding
from raydpp.extract.stage import extract
from raydpp.gradients.config import ExtractorConfig

_HEAD = 32 * 125  # about: the vocabulary's size


def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(
    corpus: str, table: str, tiny_model: str, tmp_path: Path
) -> None:
    found = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=64, dry_run=True)
    estimate = found.record["estimate"]
    done = pq.read_table(Path(table) / "gradients")
    assert estimate["examples"] == done.num_rows
    assert estimate["response_tokens"] == sum(done["response_tokens"].to_pylist())
    assert estimate["tokens"] == estimate["response_tokens"] + sum(done["prompt_tokens"].to_pylist())
    assert estimate["tokens_error"] == 0
    assert estimate["batch_error"] < 1e-4
    assert estimate["hours"]["4"] == pytest.approx(estimate["actor_hours"] / 4)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # of two blocks' linear layers
    assert 3.5 * weights * estimate["tokens"] < estimate["flops"] - 4 * _HEAD * estimate["response_tokens"]
    assert estimate["flops"] - 4 * _HEAD * estimate["response_tokens"] < 4.5 * weights * estimate["tokens"]
    assert f"measured here on one {estimate['device']}: " in found.summary
    assert 0 < estimate["fidelity"]["error"] < 0.3
    assert f"a cosine of two examples is off by {estimate['fidelity']['error']:.3f}" in found.summary
    assert "nothing was written" in found.summary
    assert not (tmp_path / "out").exists()


def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.load_extractor

    def mixing(config: ExtractorConfig, *where: Any) -> Any:
        extractor = real(config, *where)
        one_batch = extractor.one_batch

        def mixed(examples: Any) -> Any:
            found = dict(one_batch(examples))
            found["feature"] = found["feature"] + 0.01 * found["feature"].mean(0)
            return found

        extractor.one_batch = mixed  # type: ignore[method-assign]
        return extractor

    monkeypatch.setattr(module, "load_extractor", mixing)
    with pytest.raises(UserError, match="change by"):
        extract(corpus, str(tmp_path / "out"), tiny_model, dimension=64, dry_run=True)


def test_padding_is_what_batches_within_units_compute_beyond_their_tokens() -> None:
    assert padding([4, 4, 4, 4], 8, 4) == 0
    assert padding([2, 4], 8, 2) == pytest.approx(1 - 6 / 8)
    assert padding([2, 4], 8, 1) == 0
