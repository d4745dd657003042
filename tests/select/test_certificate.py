from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from raydpp.cluster import OnRay
from raydpp.dpp.budget import Budget
from raydpp.dpp.features import unit_rows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import pivot_residuals
from raydpp.dpp.objective import Objective, Score
from raydpp.select.certificate import Certificate, certify
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import open_table, vectors
from tests.select.spread import job_of


def left(rows: pa.Table, picks: list[str], owned: np.ndarray, kernel: Kernel) -> dict[str, float]:
    """The residual of every row that was not picked, one at a time."""
    x = unit_rows(vectors(rows["gradient"])).numpy()
    place = {name: i for i, name in enumerate(rows["id"].to_pylist())}
    before = [unit_rows(owned).numpy()] if len(owned) else []
    have = np.concatenate([*before, x[[place[name] for name in picks]]])
    return {
        name: float(pivot_residuals(torch.from_numpy(np.concatenate([have, x[i : i + 1]])), kernel)[-1])
        for name, i in place.items()
        if name not in picks
    }


def rows_of(table: str) -> pa.Table:
    opened = open_table(table, "gradient")
    return opened.read(opened.parts)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 1.0), Kernel("cosine")])
def test_it_says_what_the_best_example_left_would_add(cluster: None, table: str, kernel: Kernel) -> None:
    job = job_of(table, 3, Request(Budget(6), Objective(kernel)))
    picked = distributed_greedy(job, 1.0)
    certificate = certify(job, picked)
    assert certificate is not None
    assert certify(replace(job, tasks=OnRay("select")), picked) == certificate
    residuals = left(rows_of(table), picked.rows["id"].to_pylist(), np.empty((0, 64), np.float16), kernel)
    smallest = float(picked.selection.log_gains.min())
    assert certificate.smallest_accepted == pytest.approx(smallest)
    assert certificate.above == sum(np.log(r) > smallest for r in residuals.values())
    if certificate.above:
        assert certificate.largest_left == pytest.approx(np.log(max(residuals.values())), abs=1e-5)


def test_what_is_owned_or_excluded_is_taken_into_account(table: str) -> None:
    rows = rows_of(table)
    kernel, owned = Kernel("rbf", 1.0), vectors(rows["gradient"])[:3]
    twice = np.concatenate([owned, owned])  # copies of what is owned change nothing
    exclude = pa.array(rows["id"].to_pylist()[:3])
    job = job_of(table, 3, Request(Budget(4), Objective(kernel)), owned=twice, exclude=exclude)
    picked = distributed_greedy(job, 2.0)
    certificate = certify(job, picked)
    assert certificate is not None
    residuals = left(rows.slice(3), picked.rows["id"].to_pylist(), owned, kernel)
    assert certificate.above == sum(np.log(r) > picked.selection.log_gains.min() for r in residuals.values())


def test_with_quality_it_is_the_objective_that_counts(table: str) -> None:
    request = Request(Budget(6), Objective(Kernel(), 0.3), quality=(Score("response_tokens", 1.0, 3.0, 1.0),))
    job = job_of(table, 3, request)
    picked = distributed_greedy(job, 2.0)
    certificate = certify(job, picked)
    assert certificate is not None
    quality = request.scores(picked.rows)
    assert quality is not None
    worth = 0.7 * picked.selection.log_gains + 0.3 * quality
    assert certificate.smallest_accepted == pytest.approx(float(worth.min()))


def test_budgets_of_tokens_and_sources_have_none(table: str) -> None:
    job = job_of(table, 3, Request(Budget(6, maximum={"first": 3.0}), Objective(Kernel())))
    assert certify(job, distributed_greedy(job, 2.0)) is None


def test_it_is_said_in_words() -> None:
    assert "nothing left is worth more" in str(Certificate(-0.5, -0.4, 0))
    assert "7 left are worth more, the best by 0.1000" in str(Certificate(-0.4, -0.5, 7))
    assert str(Certificate(None, -0.5, 0)) == "certificate: nothing is left"
    assert Certificate(None, -0.5, 0).facts == {"largest_left": None, "smallest_accepted": -0.5, "above": 0}
