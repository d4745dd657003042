from __future__ import annotations

import numpy as np
import pytest

from raydpp.selection.kernels import Kernel
from raydpp.selection.objective import Objective
from raydpp.selection.oracles.front import DenseFront
from raydpp.selection.scouting import Rehearsal, rehearse


def covariance(seed: int, items: int = 40) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((items, 60))
    return root @ root.T / 80


def rehearsed(matrix: np.ndarray, error: float, outside: float = -np.inf, most: int = 10) -> Rehearsal:
    objective = Objective(Kernel())
    rows = np.arange(100, 100 + len(matrix))
    eligible = np.ones(len(matrix), dtype=bool)
    eligible[3] = False
    return rehearse(DenseFront(rows, matrix), error, objective, eligible, outside, 1e-3, most)


@pytest.mark.parametrize("seed", range(20))
def test_exact_picks_come_from_what_is_wanted_and_bounds_hold(seed: int) -> None:
    exact, error = covariance(seed), 1e-3
    noise = np.random.default_rng([seed, 1]).uniform(-error, error, len(exact))
    found = rehearsed(exact + np.diag(noise), 2 * error)
    assert 3 + 100 not in found.rows
    assert set(found.picks) <= set(found.rows.tolist())
    front, done, count = DenseFront(np.arange(100, 140), exact), set[int](), 0
    front.residuals[3] = 0.0
    others = ~np.isin(front.rows, found.rows)
    for _ in range(len(found.picks)):
        assert np.log(front.residuals[others].max()) <= found.highest[count]
        j = int(front.residuals.argmax())
        if np.log(front.residuals[j]) <= found.highest[count]:
            break
        assert front.rows[j] in found.rows
        front.pick(j)
        done.add(int(front.rows[j]))
        count = found.after(done, count)
    assert count > 0


def test_it_ends_where_something_outside_may_be_better() -> None:
    matrix = covariance(0)
    whole = rehearsed(matrix, 0.0)
    assert len(whole.picks) == 10
    front = DenseFront(np.arange(40), matrix)
    for pick in whole.picks[:4]:
        front.pick(pick - 100)
    outside = float(np.log(front.residuals[whole.picks[4] - 100]))
    assert rehearsed(matrix, 0.0, outside).picks == whole.picks[:4]
    assert len(rehearsed(matrix, 0.0, 99.0).rows) == 0


def test_what_has_been_done_of_a_rehearsal_is_its_longest_part() -> None:
    found = Rehearsal(np.arange(5), [4, 2, 0], np.zeros(4))
    assert found.after({2}, 0) == 0
    assert found.after({2, 4}, 0) == 2
    assert found.after({2, 4, 0, 1}, 2) == 3
