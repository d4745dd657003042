"""Budgets: how much may be picked, of what, and what never."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raydpp.errors import UserError

OTHERS = "*"
"""The quota of every source that is not named."""

Quotas = Mapping[str, float]


def count_of(size: int | float | None, rows: int) -> int:
    """A budget as a count: a whole number is one, a fraction between 0 and 1 is of the rows (at least one).

    None is all rows, for budgets that something else bounds.

    Raises:
        UserError: Neither, or more than there are rows.
    """
    if size is None:
        return rows
    if isinstance(size, bool) or not isinstance(size, int | float | np.integer | np.floating):
        raise UserError(f"a budget is a whole number of items or a fraction of them, not {size!r}")
    if 0 < size < 1:
        return max(1, round(float(size) * rows))
    if not math.isfinite(size) or size != int(size):
        raise UserError(f"a budget of {size}: give a whole number of items, or a fraction between 0 and 1")
    if size < 1:
        raise UserError(f"a budget of {int(size)} picks nothing: it must be at least 1")
    if size > rows:
        raise UserError(f"a budget of {int(size)} is larger than the pool of {rows}: lower it or add rows")
    return int(size)


def check_costs(costs: Sequence[float] | np.ndarray, rows: int) -> np.ndarray:
    """What each of N = ``rows`` items costs, as (N,) float64.

    Raises:
        UserError: Another number of costs, or one that is not a number above 0.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (rows,):
        raise UserError(f"there are {costs.size} costs for {rows} items: give one for each")
    if not (np.isfinite(costs) & (costs > 0)).all():
        bad = np.flatnonzero(~(np.isfinite(costs) & (costs > 0)))
        raise UserError(f"{len(bad)} costs are not numbers above 0 (rows {bad[:5].tolist()})")
    return costs


@dataclass(frozen=True, eq=False)
class Budget:
    """How much to pick out of N items.

    Attributes:
        size: The largest number of items: a count, a fraction of N below 1, or None for no limit.
        tokens: The largest sum of ``costs``, or None.
        costs: (N,) positive: what each item costs, such as its tokens; needed for ``tokens``.
        sources: (N,) a label for each item; needed for quotas.
        minimum: At least so many items of a source (a fraction below 1 is of the count), if there are as many; the
            key ``*`` stands for every source that is not named. Needs a size, and no tokens.
        maximum: At most so many, likewise.
        exclude: (k,) items never to be picked.
    """

    size: int | float | None = None
    tokens: float | None = None
    costs: Sequence[float] | np.ndarray | None = None
    sources: Sequence[str] | np.ndarray | None = None
    minimum: Quotas | None = None
    maximum: Quotas | None = None
    exclude: Sequence[int] | np.ndarray | None = None

    def state(self, rows: int) -> BudgetState:
        """The state of a search over N = ``rows`` items.

        Raises:
            UserError: A budget, a cost or a quota out of range, or one that needs what is not given; in words.
        """
        count = count_of(self.size, rows)
        eligible = np.ones(rows, dtype=bool)
        if self.exclude is not None:
            eligible[np.asarray(self.exclude, dtype=np.int64)] = False
        if not eligible.any():
            raise UserError("every item is owned or excluded: there is nothing to pick from")
        costs = self._costs(rows)
        groups, least, most = np.zeros(rows, dtype=np.int64), np.zeros(1), np.full(1, math.inf)
        if self.minimum or self.maximum:
            labels, groups = self._groups(rows)
            least, most = self._limits(labels, np.bincount(groups[eligible], minlength=len(labels)), rows)
        return BudgetState(eligible, count, self.tokens, costs, groups, least, most)

    def streaming_state(self, rows: int, available: Mapping[str, int]) -> BudgetState:
        """The state of a search over N items that come to it bit by bit (``BudgetState.admit``): none yet.

        Args:
            rows: N.
            available: How many items may be picked, by source; the state's groups are these, in order.

        Raises:
            UserError: As for ``state``.
        """
        self._check_tokens()
        least, most = self._limits(list(available), np.array(list(available.values()), dtype=np.int64), rows)
        none = np.zeros(0)
        costs = None if self.tokens is None else none
        return BudgetState(
            none.astype(bool), count_of(self.size, rows), self.tokens, costs, none.astype(int), least, most
        )

    def _limits(self, labels: list[str], available: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources,) the least and the most of each source, in items."""
        whole = self._whole(self.size, rows)
        least = np.minimum(_quota("minimum", self.minimum, labels, 0.0, whole), available)
        most = _quota("maximum", self.maximum, labels, math.inf, whole)
        self._check_quotas(labels, least, most, count_of(self.size, rows))
        return least, most

    def _whole(self, size: int | float | None, rows: int) -> int | None:
        return None if size is None or self.tokens is not None else count_of(size, rows)

    def _costs(self, rows: int) -> np.ndarray | None:
        if self.tokens is None:
            return None
        self._check_tokens()
        if self.costs is None:
            raise UserError("a budget of tokens needs the costs of the items: give one number for each")
        return check_costs(self.costs, rows)

    def _check_tokens(self) -> None:
        if self.tokens is not None and not (math.isfinite(self.tokens) and self.tokens > 0):
            raise UserError(f"a budget of {self.tokens} tokens: give a number above 0")

    def _groups(self, rows: int) -> tuple[list[str], np.ndarray]:
        if self.sources is None:
            raise UserError("a quota needs the sources of the items: give one label for each")
        if len(self.sources) != rows:
            raise UserError(f"there are {len(self.sources)} sources for {rows} items: give one label for each")
        labels, groups = np.unique(np.asarray(self.sources, dtype=np.str_), return_inverse=True)
        return labels.tolist(), groups

    def _check_quotas(self, labels: list[str], least: np.ndarray, most: np.ndarray, count: int) -> None:
        if least.any() and (self.tokens is not None or self.size is None):
            raise UserError("a minimum per source needs a budget in items: give a size, and no tokens")
        if (least > most).any():
            label = labels[int(np.flatnonzero(least > most)[0])]
            raise UserError(f"the minimum of source {label} is above its maximum")
        if least.sum() > count:
            raise UserError(f"the minima of the sources add up to {int(least.sum())}, more than the budget of {count}")


def _quota(name: str, given: Quotas | None, labels: list[str], default: float, count: int | None) -> np.ndarray:
    """(sources,) quotas as counts."""
    given = dict(given or {})
    for label, value in given.items():
        if label != OTHERS and label not in labels:
            raise UserError(
                f"there is a {name} for source {label!r}, and no such source: there are {', '.join(labels)}"
            )
        if not (value >= 0 and (value < 1 or value == int(value))):
            raise UserError(f"the {name} of source {label} is {value}: give a whole number or a fraction below 1")
        if 0 < value < 1 and count is None:
            raise UserError(f"the {name} of source {label} is a fraction, which needs a budget in items: give a number")
    values = np.array([given.get(label, given.get(OTHERS, default)) for label in labels], dtype=np.float64)
    fractions = (values > 0) & (values < 1)
    parts = np.where(fractions, values, 0.0) * (count or 0)
    parts = np.ceil(parts - 1e-9) if name == "minimum" else np.floor(parts + 1e-9)
    return np.where(fractions, parts, values)


class BudgetState:
    """What may still be picked; items only ever become ineligible.

    Attributes:
        eligible: (N,) bool: what may be picked next.
        left: How many items may still be picked at the most.
    """

    def __init__(
        self,
        eligible: np.ndarray,
        size: int,
        tokens: float | None = None,
        costs: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        minimum: np.ndarray | None = None,
        maximum: np.ndarray | None = None,
    ) -> None:
        self.eligible = eligible
        self.left = size
        self._tokens = tokens
        self._costs = costs
        self._groups = np.zeros(len(eligible), dtype=np.int64) if groups is None else groups
        self._least = np.zeros(1) if minimum is None else minimum.copy()
        self._most = np.full(1, math.inf) if maximum is None else maximum.copy()
        if costs is not None and tokens is not None:
            eligible &= costs <= tokens
        for group in np.flatnonzero(self._most <= 0):
            eligible[self._groups == group] = False
        self._reserve()

    @property
    def full(self) -> bool:
        """Whether the budget is used up: no item more, or none that costs so little."""
        return self.left == 0 or (self._tokens is not None and not self.eligible.any())

    @property
    def at_most(self) -> int:
        """An upper bound on the number of picks that are still possible."""
        count = min(self.left, int(self.eligible.sum()))
        if self._costs is None or self._tokens is None:
            return count
        cheapest = np.cumsum(np.sort(self._costs[self.eligible]))
        return min(count, int(np.searchsorted(cheapest, self._tokens, side="right")))

    def take(self, index: int) -> None:
        """Book a pick."""
        group = self._groups[index]
        self.eligible[index] = False
        self.left -= 1
        if self._costs is not None and self._tokens is not None:
            self._tokens -= float(self._costs[index])
            self.eligible &= self._costs <= self._tokens
        self._most[group] -= 1
        if self._most[group] <= 0:
            self.eligible[self._groups == group] = False
        if self._least[group] > 0:
            self._least[group] -= 1
        self._reserve()

    @property
    def limits(self) -> tuple[float | None, np.ndarray]:
        """What may be picked next: the most that it may cost, and whether it may be of a group, (groups,) bool."""
        owed = bool(self._least.any()) and self.left <= self._least.sum()
        return self._tokens, (self._most > 0) & ((self._least > 0) | (not owed))

    def extend(self, rows: int) -> None:
        """Put rows behind the items that are never eligible."""
        self.admit(np.zeros(rows, dtype=np.int64), np.full(rows, math.inf))
        self.eligible[len(self.eligible) - rows :] = False

    def admit(self, groups: np.ndarray, costs: np.ndarray) -> None:
        """Put items behind the others, (n,) of these groups and costs, that meet the ``terms``."""
        self.eligible = np.concatenate([self.eligible, np.ones(len(groups), dtype=bool)])
        self._groups = np.concatenate([self._groups, groups])
        if self._costs is not None:
            self._costs = np.concatenate([self._costs, costs])

    def why_nothing(self) -> str:
        """Why nothing is eligible though the budget is not used up, in words."""
        return "the maxima of the sources leave nothing to pick" if np.isfinite(self._most).any() else "no item is left"

    def _reserve(self) -> None:
        """When what is left is owed to the minima, only their sources may be picked."""
        if self._least.any() and self.left <= self._least.sum():
            self.eligible &= (self._least > 0)[self._groups]


def in_order(
    state: BudgetState, order: Iterable[int], progress: Callable[[int, float], None] | None = None
) -> list[int]:
    """Take what is eligible, in this order, until the state is full; ``progress`` hears of NaN log gains."""
    picks: list[int] = []
    for index in order:
        if state.full:
            break
        if state.eligible[index]:
            state.take(int(index))
            picks.append(int(index))
            if progress is not None:
                progress(len(picks), math.nan)
    return picks
