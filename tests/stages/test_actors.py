from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from raydpp import store
from raydpp.corpus.tokenization import Masking, TokenizedExample
from raydpp.errors import UserError
from raydpp.extraction.extractor import ExampleFeatures, ExtractorConfig
from raydpp.stages.actors import FeatureActor, Work, tokenize_unit
from raydpp.stages.cluster import ActorPlan
from raydpp.stages.isolation import Features
from raydpp.stages.tables import GRADIENTS
from raydpp.stages.units import REJECTS, Unit
from tests.stages.faults import Deadly, refusing

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the model's process cannot import tests

DEADLY, HOPELESS = 7, 9


def scored(examples: Sequence[TokenizedExample]) -> ExampleFeatures:
    """Features of 4 dimensions and both scores; an extractor knows none of them where every example is hopeless."""
    first = np.array([example.ids[0] for example in examples], np.float32)
    reasons = ["hopeless" if token == HOPELESS else None for token in first]
    some = None in reasons
    features = np.zeros((len(first), 4), np.float32)
    features[:, 0] = [reason is None for reason in reasons]
    losses, difficulties = (first, 2 * first) if some else (None, None)
    return ExampleFeatures(features, first, losses, difficulties, reasons, len(first))


class Isolated(FeatureActor):
    """An actor whose model is ``scored`` in a process that dies on DEADLY."""

    def loader(self) -> Callable[[], Features]:
        return lambda: Deadly(DEADLY, scored)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    (tmp_path / "run.json").write_text(json.dumps({"attempt": 1}))
    plan = ActorPlan(0.0, 1.0, 1, 1, 1)
    return Work(str(tmp_path), 1, ExtractorConfig("none"), Masking(), store.gradient_schema(4, difficulty=True), plan)


@pytest.fixture
def actor(work: Work) -> Any:
    found = Isolated(work)
    yield found
    assert not isinstance(found._extractor, UserError)
    found._extractor.close()


def unit(first: list[int | None]) -> pa.Table:
    """A tokenised unit of examples of two tokens; None is a row the tokenizer refused."""
    rows = [
        {
            "unit": "part",
            "id": f"{row:02d}",
            "source": "s",
            "ids": None if token is None else [token, 1],
            "response": None if token is None else [False, True],
            "truncated": False,
            "reason": "refused" if token is None else None,
        }
        for row, token in enumerate(first)
    ]
    return pa.Table.from_pylist(rows)


def outcome(out: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The table's difficulties and the rejects' reasons, by id."""
    tables = [pq.read_table(path) for path in (Path(out) / GRADIENTS).glob("*.parquet")]
    lines = [line for path in (Path(out) / REJECTS).glob("*") for line in path.read_text().splitlines()]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["id"]: row["difficulty"] for row in rows}, {one["id"]: one["reason"] for one in map(json.loads, lines)}


def test_a_unit_ends_in_a_table_and_rejects_with_reasons(actor: FeatureActor, work: Work) -> None:
    (report,) = actor(unit([2, None, HOPELESS, 3])).to_pylist()
    assert (report["rows"], report["rejects"], report["tokens"], report["error"]) == (2, 2, 6, None)
    assert outcome(work.out) == ({"00": 4.0, "03": 6.0}, {"01": "refused", "02": "hopeless"})


@pytest.mark.parametrize("bad", [None, HOPELESS, DEADLY])
def test_a_unit_without_a_usable_row_is_all_rejects(actor: FeatureActor, work: Work, bad: int | None) -> None:
    (report,) = actor(unit([bad, bad])).to_pylist()
    assert (report["rows"], report["rejects"], report["error"]) == (0, 2, None)
    table, rejects = outcome(work.out)
    assert not table
    assert sorted(rejects) == ["00", "01"]


def test_a_half_in_which_nothing_is_usable_takes_no_score_from_the_other(actor: FeatureActor, work: Work) -> None:
    actor(unit([HOPELESS, DEADLY, 2, 3]))
    table, rejects = outcome(work.out)
    assert table == {"02": 4.0, "03": 6.0}
    assert sorted(rejects) == ["00", "01"]


def test_a_worker_whose_run_was_taken_over_writes_nothing(actor: FeatureActor, work: Work) -> None:
    (Path(work.out) / "run.json").write_text(json.dumps({"attempt": 2}))
    (report,) = actor(unit([2])).to_pylist()
    assert "taken over" in report["error"]
    assert outcome(work.out) == ({}, {})


def test_what_one_row_does_to_the_tokenizer_is_its_reason(work: Work, tiny_model: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "yes"}
    good = [{"role": "user", "content": "what is a"}, answer]
    corpus = pa.table({"id": ["a", "b"], "source": ["s", "s"], "messages": [good, [answer]]})
    store.write_table(str(tmp_path / "corpus.parquet"), corpus)
    strict = refusing(tiny_model, tmp_path / "strict", "messages[0]['role'] != 'user'", "no user")
    config = Work(work.out, 1, ExtractorConfig(strict), Masking(), work.schema, work.plan)
    good_row, bad_row = tokenize_unit(Unit("u", str(tmp_path / "corpus.parquet"), np.array([0, 1])), config).to_pylist()
    assert good_row["reason"] is None
    assert sum(good_row["response"]) == 2  # the word and the end of turn
    assert bad_row["ids"] is None
    assert "no user" in bad_row["reason"]
