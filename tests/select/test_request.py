from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydpp.dpp.budget import Budget
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.select.request import Request, numbers, parse_quotas, parse_score, select_rows
from raydpp.tables import vector_array, vectors


def rows(n: int, seed: int = 0, copies: int = 0) -> pa.Table:
    points = np.random.default_rng(seed).standard_normal((n, 6))
    points[n - copies :] = points[:copies]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return pa.table(
        {
            "id": [f"{index:04d}" for index in range(n)],
            "gradient": vector_array(points, pa.float64()),
            "response_tokens": np.arange(n),
        }
    )


def of(size: int | None = None, weight: float = 0.0, **budget: Any) -> Request:
    return Request(Budget(size, **budget), Objective(Kernel(), weight))


def test_partitions_hand_in_more_than_their_share() -> None:
    request = of(100, tokens=1000.0, minimum={"a": 10}, maximum={"b": 5})
    assert request.share(1, 2.0) is request
    assert request.share(8, 2.0).budget == Budget(25, 250.0, {"a": 3}, {"b": 5})
    assert request.share(8, 2.0).objective == request.objective
    assert of(3).share(2, 4.0).budget.size == 3
    assert of(8, minimum={"a": 3, "b": 5}).share(8, 1.0).budget.size == 2
    assert of(min_log_gain=-1.0).share(8, 2.0).budget == Budget(min_log_gain=-1.0)


def test_rows_are_picked_whatever_their_order() -> None:
    table, request = rows(40), of(10)
    picks, selection = select_rows(table, request)
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(40)))
    assert select_rows(shuffled, request)[0]["id"].to_pylist() == picks["id"].to_pylist()
    assert table.take(pa.array(selection.indices)).equals(picks)


def test_merging_comes_close_to_one_machine_and_drops_copies() -> None:
    table, request = rows(120, copies=30), of(20)
    whole = select_rows(table, request)[1].log_det
    order = np.random.default_rng(0).permutation(120)
    parts = [table.take(pa.array(order[i::4])) for i in range(4)]
    handed = [select_rows(part, request.share(4, 2.0))[0] for part in parts]
    picks, selection = select_rows(pa.concat_tables(handed), request)
    assert len(picks) == 20
    assert whole - 20 * 0.05 < selection.log_det <= whole + 1e-9
    single = select_rows(table.take(pa.array(order[:20])), request)[1]
    assert len(single.indices) < 20 or single.log_det < selection.log_det


def test_quality_is_standardised_by_the_whole_tables_numbers() -> None:
    table = rows(30)
    request = replace(of(3, 1.0), quality=(Score("response_tokens", 2.0, 14.5, 8.0),))
    picks, _ = select_rows(table, request)
    assert picks["id"].to_pylist() == ["0029", "0028", "0027"]
    scores = request.scores(table.slice(29))
    assert scores is not None
    assert scores[0] == pytest.approx((29 - 14.5) / 8)
    assert request.columns == ("response_tokens",)


def test_what_is_owned_excluded_or_over_its_quota_is_not_picked() -> None:
    table, features = rows(60), vectors(rows(60)["gradient"])
    owned = features[:5]
    excluded = pa.array([f"{i:04d}" for i in range(8)])
    picks, selection = select_rows(table, of(12), owned=owned, exclude=excluded)
    expected = greedy_map(features[8:], 12, owned=owned, ids=table["id"].to_pylist()[8:])
    assert picks["id"].to_pylist() == [f"{i + 8:04d}" for i in expected.indices]
    assert selection.log_det == pytest.approx(expected.log_det)
    none, selection = select_rows(table, of(12), exclude=table["id"].combine_chunks())
    assert (len(none), selection.stopped) == (0, "there is nothing to pick from")
    table = table.append_column("source", pa.array(["a", "b"] * 30))
    request = of(10, maximum={"a": 2, "elsewhere": 1}, minimum={"b": 3, "gone": 4})
    assert select_rows(table, request)[0]["source"].to_pylist().count("a") == 2


def test_tokens_come_from_their_column() -> None:
    table = rows(40).set_column(2, "response_tokens", pa.array(np.arange(1, 41)))
    request = of(tokens=60.0)
    picks, _ = select_rows(table, request)
    assert request.columns == ("response_tokens",)
    assert 40 < sum(picks["response_tokens"].to_pylist()) <= 60


def test_a_column_that_is_not_numbers_is_refused() -> None:
    table = pa.table({"a": pa.array([1, None, 3]), "b": ["x", "y", "z"], "c": [True, False, True]})
    with pytest.raises(UserError, match="1 rows have no 'a'"):
        numbers(table, "a")
    with pytest.raises(UserError, match="'b' is string, not numbers"):
        numbers(table, "b")


def test_a_tables_rows_become_the_items_of_a_shard() -> None:
    table = rows(6).append_column("source", pa.array(["a", None, "b"] * 2))
    table = table.set_column(2, "response_tokens", pa.array([0, 2, 3, 4, 5, 6]))
    plain = of(6).items(table)
    np.testing.assert_array_equal(plain.features, vectors(table["gradient"]))
    assert plain.ids == table["id"].to_pylist()
    assert (plain.sources, plain.costs, plain.excluded.tolist()) == (None, None, [])
    assert not plain.modular.any()
    score = Score("response_tokens", 1.0, 3.0, 1.0)
    request = replace(of(None, 0.5, tokens=9.0, maximum={"a": 1}), quality=(score,))
    items = request.items(table, pa.array(["0000", "0004", "elsewhere"]))
    assert items.excluded.tolist() == [0, 4]
    assert items.sources is not None
    assert items.costs is not None
    assert items.sources.tolist() == ["a", "None", "b"] * 2
    assert items.costs[[1, 2, 3, 5]].tolist() == [2.0, 3.0, 4.0, 6.0]
    np.testing.assert_allclose(items.modular[[1, 5]], [-0.5 - 0.5 * np.log(2), 1.5 - 0.5 * np.log(6)])
    assert np.isfinite(items.modular).all()
    with pytest.raises(UserError, match=r"1 costs are not numbers above 0 \(rows \[0\]\)"):
        request.items(table, pa.array(["0004"]))


def test_a_share_never_exceeds_the_whole() -> None:
    whole = of(10, minimum={"x": 6.0}, maximum={"x": 7.0})
    assert whole.share(3, 4.0).budget == Budget(10, None, {"x": 6}, {"x": 7.0})
    assert of(tokens=90.0).share(3, 4.0).budget.tokens == 90.0


def test_a_quota_is_a_source_and_a_number_or_a_fraction() -> None:
    assert parse_quotas("--min-per-source", ["a=3", "b=c=0.25", "*=1"]) == {"a": 3.0, "b=c": 0.25, "*": 1.0}
    for text in ("a", "=3", "a=x", "a=-1", "a=1.5", "a=nan", "a=inf"):
        with pytest.raises(UserError, match=r"--min-per-source .*: give SOURCE=NUMBER, or SOURCE=FRACTION below 1"):
            parse_quotas("--min-per-source", [text])


def test_a_score_is_a_column_and_a_weight() -> None:
    assert parse_score("loss=-0.5") == Score("loss", -0.5)
    assert parse_score("length") == Score("length", 1.0)
    for text in ("=2", "loss=x", "loss=", "loss=0", "loss=nan"):
        with pytest.raises(UserError, match="give COLUMN or COLUMN=WEIGHT"):
            parse_score(text)
