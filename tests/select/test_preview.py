from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select import preview
from raydpp.select.preview import preview_table
from raydpp.select.request import Request
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import write_table


def picked(out: str) -> set[str]:
    return set(pq.read_table(Path(out) / "selection")["id"].to_pylist())


def test_a_preview_says_what_each_choice_would_select(table: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    seen = select(table, out, 10, quality_weight=0.5, preview=True)
    assert [path.name for path in Path(out).iterdir()] == ["preview.html"]
    assert "nothing was selected yet" in seen.summary
    found = {(one["gamma"], one["weight"]): one for one in seen.record["preview"]}
    assert len(found) == len(seen.record["preview"]) == 12
    assert [weight for _, weight in found] == [0.0, 0.25, 0.5, 0.75] * 3
    mine = select(table, out, 10, quality_weight=0.5)  # into the same folder
    gammas = sorted({gamma for gamma, _ in found})
    assert gammas[1] == mine.record["gamma"]
    own = picked(out)
    for number, (gamma, weight) in enumerate([(gammas[0], 0.0), (gammas[1], 0.5), (gammas[2], 0.75)]):
        # The table is smaller than a sample: what is shown is what a selection gives.
        run = select(table, str(tmp_path / str(number)), 10, gamma=gamma, quality_weight=weight)
        one, rows = found[gamma, weight], pq.read_table(Path(run.out) / "gradients")
        assert one["last_log_gain"] == pytest.approx(pq.read_table(Path(run.out) / "selection")["log_gain"][-1].as_py())
        assert one["shared"] == len(picked(run.out) & own) / 10
        assert one["median_tokens"] == np.median(rows["response_tokens"].to_numpy())
        assert one["sources"] == pytest.approx(
            {name: rows["source"].to_pylist().count(name) / 10 for name in set(rows["source"].to_pylist())}
        )
    assert len(seen.record["overlaps"]) == 12 * 11 / 2
    assert "<figure" in (Path(out) / "preview.html").read_text()
    assert select(table, out, 10, quality_weight=0.5).repeated
    json.dumps(seen.record)


def test_own_gammas_targets_and_what_is_owned_count(table: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = select(table, str(tmp_path / "first"), 5)
    options: dict[str, Any] = {"gamma": 0.03, "target": [first.out], "owned": [first.out], "max_per_source": ["*=0.6"]}
    seen = select(table, out, 10, quality_weight=0.1, **options, preview=True)
    found = {(one["gamma"], one["weight"]): one for one in seen.record["preview"]}
    assert {gamma for gamma, _ in found} > {0.03}
    assert {weight for _, weight in found} == {0.0, 0.1, 0.25, 0.5, 0.75}
    run = select(table, out, 10, quality_weight=0.1, **options)
    assert found[0.03, 0.1]["shared"] == 1.0
    assert max(found[0.03, 0.1]["sources"].values()) <= 0.6
    without = select(table, str(tmp_path / "without"), 10, gamma=0.03, owned=[first.out], max_per_source=["*=0.6"])
    last = pq.read_table(Path(without.out) / "selection")["log_gain"][-1].as_py()
    assert found[0.03, 0.0]["last_log_gain"] == pytest.approx(last)
    assert run.record["quality_unit"] > 0


def test_without_quality_only_gammas_differ_and_without_gamma_only_weights(table: str, tmp_path: Path) -> None:
    points = np.random.default_rng(0).standard_normal((30, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = pa.table({"id": [f"{n:02d}" for n in range(30)], "gradient": list(points)})
    write_table(Folder.at(tmp_path), "plain.parquet", rows)
    plain = str(tmp_path / "plain.parquet")
    seen = select(plain, str(tmp_path / "out"), 6, preview=True).record["preview"]
    assert [(one["weight"], one["quality"], one["median_tokens"]) for one in seen] == [(0.0, None, None)] * 3
    seen = select(table, str(tmp_path / "cosine"), 6, kernel="cosine", preview=True).record["preview"]
    assert [(one["gamma"], one["weight"]) for one in seen] == [(None, weight) for weight in preview.WEIGHTS]


def test_a_large_table_is_seen_by_a_sample(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SAMPLE", 16)
    monkeypatch.setattr(preview, "_FEWEST", 2)
    seen = select(table, str(tmp_path / "out"), 20, preview=True)
    assert "8 of a sample of 16 of 40 examples" in seen.summary
    assert {one["examples"] for one in seen.record["preview"]} == {8}


def test_budgets_are_those_of_the_part_that_is_seen() -> None:
    request = Request(Budget(1_000, minimum={"a": 50}, maximum={"b": 30}), Objective(Kernel()))
    scaled = preview._scaled(request, 2_000, 10_000).budget
    assert (scaled.size, scaled.minimum, scaled.maximum) == (200, {"a": 10}, {"b": 6})
    assert preview._scaled(request, 2_000, 1_000_000).budget.size == preview._FEWEST
    assert preview._scaled(replaced(request, Budget(30)), 2_000, 1_000_000).budget.size == 30
    assert preview._scaled(replaced(request, Budget(tokens=5_000)), 100, 1_000).budget.tokens == 500
    assert preview._scaled(replaced(request, Budget(min_log_gain=-1)), 100, 1_000).budget == Budget(min_log_gain=-1)


def replaced(request: Request, budget: Budget) -> Request:
    return Request(budget, request.objective)


def test_a_table_leaves_out_what_has_no_number() -> None:
    one = {"gamma": None, "weight": 0.0, "last_log_gain": -1.0, "quality": None, "median_tokens": None, "shared": 1.0}
    shown = preview_table([{**one, "sources": {"a": 0.75, "b": 0.25}}], "t")
    assert list(shown.headings) == ["quality weight", "last log gain", "shared with yours", "source mix"]
    assert shown.rows[0][-1] == "75% a, 25% b"
    assert Here().cpus
