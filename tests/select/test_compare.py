from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from raydpp.diversity.distance import log_det_distance, projection_error
from raydpp.dpp.budget import Budget
from raydpp.dpp.features import unit_rows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.select.compare import Choice, check_size, comparison, comparison_table, pick_baselines, possible, source_mix
from raydpp.select.request import Picked, Request, select_rows
from raydpp.tables import open_table, vector_array, vectors
from tests.select.spread import job_of


def rows(n: int = 30) -> pa.Table:
    points = np.random.default_rng(0).standard_normal((n, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return pa.table(
        {
            "id": [f"{i:03d}" for i in range(n)],
            "source": ["a", "b", "b"] * (n // 3),
            "gradient": vector_array(points, pa.float64()),
            "response_tokens": np.arange(1, n + 1),
        }
    )


def test_a_method_is_described_by_its_picks(table: str) -> None:
    request = Request(Budget(9), Objective(Kernel()), quality=(Score("response_tokens", 1.0, 10.0, 2.0),))
    picked, selection = select_rows(rows(), request)
    job = job_of(table, 1, request)
    job = replace(job, table=replace(job.table, kind=pa.list_(pa.float64(), 6), fingerprint=None))
    (found,) = comparison(job, {"greedy": Picked(picked, selection)})
    assert found["log_det"] == pytest.approx(selection.log_det)
    expected = log_det_distance(vectors(rows()["gradient"]), 9, reference_seeds=(0, 1, 2))
    assert found["distance"] == pytest.approx(expected.mean)
    tokens = picked["response_tokens"].to_numpy()
    assert found["quality"] == pytest.approx(((tokens - 10) / 2).mean())
    assert (found["tokens"], found["median_tokens"]) == (tokens.sum(), np.median(tokens))
    given = Picked(picked, select_rows(rows(), Request(Budget(9), Objective(Kernel())), owned=np.eye(6))[1])
    (found,) = comparison(replace(job, given=replace(job.given, count=6)), {"greedy": given})
    assert found["log_det"] == pytest.approx(selection.log_det)  # of the set by itself
    assert found["error"] is None  # plain vectors are no projections


def test_sets_of_projected_gradients_say_how_far_their_distance_is_off(table: str) -> None:
    opened = open_table(table, "gradient")
    request = Request(Budget(6), Objective(Kernel()), opened.column)
    job = job_of(table, 1, request)
    picked = Picked(*select_rows(opened.read(opened.parts), request))
    (found,) = comparison(replace(job, table=opened), {"greedy": picked})
    assert found["error"] == projection_error(vectors(picked.rows["gradient"]), Kernel())
    assert found["error"] > 0
    (plain,) = comparison(replace(job, table=replace(opened, fingerprint=None)), {"greedy": picked})
    assert plain == {**found, "error": None}


def test_baselines_run_beside_each_other(table: str) -> None:
    opened = open_table(table, "gradient")
    request = Request(Budget(6), Objective(Kernel()), opened.column)
    shut = pa.array(opened.read(opened.parts)["id"].to_pylist()[:10])
    job = job_of(table, 1, request, exclude=shut)
    found = pick_baselines(job, [Choice("random", seed=3), Choice("length")])
    assert list(found) == ["random", "length"]
    for picked in found.values():
        assert len(picked.rows) == 6
        assert not set(picked.rows["id"].to_pylist()) & set(shut.to_pylist())
    (round_robin,) = pick_baselines(replace(job, targets=[opened]), [Choice("round-robin")]).values()
    whole = opened.read(opened.parts)  # the table as its own target, of two sources: many ties of 1
    points, sources = unit_rows(vectors(whole["gradient"])).numpy(), whole["source"].to_numpy()
    turns = [(points[10:] @ points[sources == one].T).max(1) for one in dict.fromkeys(sources)]
    picks: list[int] = []
    for turn in range(6):
        picks.append(next(n for n in np.argsort(-turns[turn % 2].round(6), kind="stable") if n not in picks))
    assert round_robin.rows["id"].to_pylist() == [whole["id"][10 + n].as_py() for n in picks]
    lengths = opened.read(opened.parts).slice(10)["response_tokens"].to_numpy()
    assert sorted(found["length"].rows["response_tokens"].to_pylist()) == np.sort(lengths)[-6:].tolist()


def test_baselines_that_cannot_answer_are_left_out(table: str) -> None:
    opened = open_table(table, "gradient")
    plain = Request(Budget(5), Objective(Kernel()))
    assert [possible(name, plain, opened) for name in ("quality", "length", "k-means", "dedup")] == [
        False,
        True,
        True,
        True,
    ]
    assert not possible("k-means", Request(Budget(tokens=5.0), Objective(Kernel())), opened)
    assert not possible("k-means", Request(Budget(5, maximum={"a": 1}), Objective(Kernel())), opened)
    assert not possible("length", Request(Budget(5), Objective(Kernel()), cost="charm"), opened)
    assert possible("facility-location", plain, opened)
    many = replace(opened, parts=opened.parts * (20_000 // opened.rows + 1))
    assert not possible("facility-location", plain, many)
    assert not possible("round-robin", plain, opened)
    assert possible("round-robin", plain, opened, [opened])
    assert not possible("round-robin", plain, many, [many])
    check_size(20_000)
    with pytest.raises(UserError, match="too many for m = 20001"):
        check_size(20_001)


def test_the_table_shows_the_most_diverse_first() -> None:
    base = {"examples": 5, "distance": 0.25, "error": None, "quality": None, "tokens": None, "median_tokens": 7.0}
    records = [
        {"method": "one", "log_det": -3.0, "sources": {"a": 0.75, "b": 0.25}, **base},
        {"method": "other", "log_det": -1.0, "sources": dict.fromkeys("abcde", 0.2), **base},
    ]
    text = io.StringIO()
    Console(file=text, width=140).print(comparison_table(records))
    lines = text.getvalue()
    assert lines.index("other") < lines.index("one ")
    assert "75% a, 25% b" in lines
    assert "20% c, ..." in lines
    assert "median" in lines
    assert "quality" not in lines  # neither has any


def test_the_source_mix_is_in_shares() -> None:
    assert source_mix(rows()) == {"b": pytest.approx(2 / 3), "a": pytest.approx(1 / 3)}
    assert source_mix(rows().drop_columns("source")) == {}
