from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raydpp.dpp.budget import Budget
from raydpp.dpp.features import unit_rows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import pivot_residuals
from raydpp.dpp.objective import Objective, Score
from raydpp.select.certificate import Certificate, certify
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import GradientTable, Part, open_table, partition_files, vectors


def left(rows: pa.Table, picks: list[str], owned: np.ndarray, kernel: Kernel) -> dict[str, float]:
    """The residual of every row that was not picked, one at a time."""
    x = vectors(rows["gradient"])
    place = {name: i for i, name in enumerate(rows["id"].to_pylist())}
    have = np.concatenate([owned, x[[place[name] for name in picks]]])
    return {
        name: float(pivot_residuals(unit_rows(np.concatenate([have, x[i : i + 1]])), kernel)[-1])
        for name, i in place.items()
        if name not in picks
    }


def opened(table: str, partitions: int = 3) -> tuple[GradientTable, list[list[Part]], pa.Table]:
    found = open_table(table, "gradient")
    return found, partition_files(found.parts, partitions), found.read(found.parts)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 1.0), Kernel("cosine")])
def test_it_says_what_the_best_example_left_would_add(table: str, kernel: Kernel) -> None:
    found, groups, rows = opened(table)
    assert len(groups) > 1
    request = Request(Budget(6), Objective(kernel), found.column)
    picked = distributed_greedy(found, groups, request, 1.0, "title")
    certificate = certify(found, groups, request, picked, "title")
    assert certificate is not None
    residuals = left(rows, picked.rows["id"].to_pylist(), np.empty((0, 64), np.float16), kernel)
    smallest = float(picked.selection.log_gains.min())
    assert certificate.smallest_accepted == pytest.approx(smallest)
    assert certificate.above == sum(np.log(r) > smallest for r in residuals.values())
    if certificate.above:
        assert certificate.largest_left == pytest.approx(np.log(max(residuals.values())), abs=1e-5)


def test_what_is_owned_or_excluded_is_taken_into_account(table: str) -> None:
    import ray

    found, groups, rows = opened(table)
    kernel, owned = Kernel("rbf", 1.0), vectors(rows["gradient"])[:3]
    twice = np.concatenate([owned, owned])  # copies of what is owned change nothing
    exclude = pa.array(rows["id"].to_pylist()[:3])
    request = Request(Budget(4), Objective(kernel), found.column)
    picked = distributed_greedy(found, groups, request, 2.0, "title", ray.put(twice), exclude, 6)
    certificate = certify(found, groups, request, picked, "title", ray.put(twice), exclude, 6)
    assert certificate is not None
    residuals = left(rows.slice(3), picked.rows["id"].to_pylist(), owned, kernel)
    assert certificate.above == sum(np.log(r) > picked.selection.log_gains.min() for r in residuals.values())


def test_with_quality_it_is_the_objective_that_counts(table: str) -> None:
    found, groups, _ = opened(table)
    scores = (Score("response_tokens", 1.0, 3.0, 1.0),)
    request = Request(Budget(6), Objective(Kernel(), 0.3), found.column, scores)
    picked = distributed_greedy(found, groups, request, 2.0, "title")
    certificate = certify(found, groups, request, picked, "title")
    assert certificate is not None
    quality = request.scores(picked.rows)
    assert quality is not None
    worth = 0.7 * picked.selection.log_gains + 0.3 * quality
    assert certificate.smallest_accepted == pytest.approx(float(worth.min()))


def test_budgets_of_tokens_and_sources_have_none(table: str) -> None:
    found, groups, _ = opened(table)
    request = Request(Budget(6, maximum={"first": 3.0}), Objective(Kernel()), found.column)
    picked = distributed_greedy(found, groups, request, 2.0, "title")
    assert certify(found, groups, request, picked, "title") is None


def test_it_is_said_in_words() -> None:
    assert "nothing left is worth more" in str(Certificate(-0.5, -0.4, 0))
    assert "7 left are worth more, the best by 0.1000" in str(Certificate(-0.4, -0.5, 7))
    assert str(Certificate(None, -0.5, 0)) == "certificate: nothing is left"
    assert Certificate(None, -0.5, 0).facts == {"largest_left": None, "smallest_accepted": -0.5, "above": 0}
