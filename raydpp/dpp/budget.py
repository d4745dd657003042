"""Budgets: how much may be picked, and of what."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from raydpp.dpp import Progress
from raydpp.errors import UserError

if TYPE_CHECKING:
    from raydpp.dpp.features import Items

OTHERS = "*"
"""The quota of every source that is not named."""

Quotas = Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """How much to pick out of N items.

    Attributes:
        size: The largest number of items: a count, a fraction of N below 1, or None for no limit.
        tokens: The largest sum of the items' costs, or None.
        minimum: At least so many items of a source (a fraction below 1 is of the size), if there are as many; the
            key ``*`` stands for every source that is not named. Needs a size, and no tokens.
        maximum: At most so many of a source, in the same form.
        min_log_gain: Where to stop: before the first pick whose log gain, in nats, is below this. None for nowhere.
    """

    size: int | float | None = None
    tokens: float | None = None
    minimum: Quotas = field(default_factory=dict)
    maximum: Quotas = field(default_factory=dict)
    min_log_gain: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and not (math.isfinite(self.tokens) and self.tokens > 0):
            raise UserError(f"a budget of {self.tokens} tokens: give a number above 0")
        if self.min_log_gain is not None and not math.isfinite(self.min_log_gain):
            raise UserError(f"a smallest log gain of {self.min_log_gain}: give a number of nats")
        for name, quotas in (("minimum", self.minimum), ("maximum", self.maximum)):
            for source, value in quotas.items():
                quota = f"the {name} of source {source} is"
                if not (0 <= value < math.inf and (value < 1 or value == int(value))):
                    raise UserError(f"{quota} {value}: give a whole number or a fraction below 1")
                if 0 < value < 1 and self.size is None:
                    raise UserError(f"{quota} a fraction, which needs a budget in items: give a number")

    def in_counts(self, rows: int, sources: Collection[str]) -> Budget:
        """The same budget for N = ``rows`` items of these sources, without fractions and ``*``."""
        size = None if self.size is None else count_of(self.size, rows)
        minimum, maximum = (
            _quota_counts(name, quotas, sources, size)
            for name, quotas in (("minimum", self.minimum), ("maximum", self.maximum))
        )
        return replace(self, size=size, minimum=minimum, maximum=maximum)

    def keeping_mix(self, part: float, counts: Mapping[str, int]) -> Budget:
        """The same budget with minima for the sources that have none: so large a part, 0 to 1, of what each would have
        of ``size`` items in the mix of ``counts``, rounded down."""
        if self.size is None or self.tokens is not None:
            raise UserError(
                "to keep the mix of sources needs a size, and no budget of tokens: they would count as items"
            )
        total = sum(counts.values())
        shares = {source: math.floor(part * self.size * rows / total + 1e-9) for source, rows in counts.items()}
        return replace(self, minimum={**shares, **self.minimum})

    def within(self, items: Items) -> Budget:
        """The same budget for a part of the items: no more than there are, of the sources that are there."""
        here = {OTHERS} if items.sources is None else {OTHERS, *np.unique(items.sources).tolist()}
        size = None if self.size is None else min(self.size, len(items))
        minimum, maximum = ({s: n for s, n in quotas.items() if s in here} for quotas in (self.minimum, self.maximum))
        return replace(self, size=size, minimum=minimum, maximum=maximum)

    def state(self, items: Items) -> BudgetState:
        """The state of a search over these items; a budget that they cannot meet is refused."""
        n = len(items)
        eligible = np.ones(n, dtype=bool)
        eligible[items.excluded] = False
        if not eligible.any():
            raise UserError("every item is owned or excluded: there is nothing to pick from")
        if self.tokens is not None and items.costs is None:
            raise UserError("a budget of tokens needs the costs of the items: give one number for each")
        costs = np.zeros(n) if items.costs is None else items.costs
        labels, groups = np.array([""]), np.zeros(n, dtype=np.int64)
        if self.minimum or self.maximum:
            if items.sources is None:
                raise UserError("a quota needs the sources of the items: give one label for each")
            labels, groups = np.unique(items.sources, return_inverse=True)
        counts = np.bincount(groups[eligible], minlength=len(labels))
        return self._state(n, dict(zip(labels.tolist(), counts.tolist(), strict=True)), eligible, costs, groups)

    def streaming_state(self, rows: int, available: Mapping[str, int]) -> BudgetState:
        """The state of a search over N = ``rows`` items, none of which is added yet.

        ``available`` says how many may be picked by source; the state's groups are these, in order.
        """
        return self._state(rows, available, np.zeros(0, dtype=bool), np.zeros(0), np.zeros(0, dtype=np.int64))

    def _state(
        self, rows: int, available: Mapping[str, int], eligible: np.ndarray, costs: np.ndarray, groups: np.ndarray
    ) -> BudgetState:
        counts = self.in_counts(rows, available)
        size = rows if counts.size is None else int(counts.size)
        least = np.array([min(counts.minimum.get(source, 0), n) for source, n in available.items()], dtype=np.float64)
        most = np.array([counts.maximum.get(source, math.inf) for source in available], dtype=np.float64)
        if least.any() and (self.tokens is not None or self.size is None):
            raise UserError("a minimum per source needs a budget in items: give a size, and no tokens")
        if self.size is None and self.tokens is None and self.min_log_gain is None:
            raise UserError("no budget: give a size, a number of tokens, or a smallest log gain to stop at")
        if (least > most).any():
            source = list(available)[int(np.flatnonzero(least > most)[0])]
            raise UserError(f"the minimum of source {source} is above its maximum")
        if least.sum() > size:
            raise UserError(f"the minima of the sources add up to {int(least.sum())}, more than the budget of {size}")
        min_log_gain = -math.inf if self.min_log_gain is None else self.min_log_gain
        return BudgetState(eligible, size, self.tokens, costs, groups, least, most, min_log_gain)


def count_of(size: int | float, rows: int) -> int:
    """A budget as a count: a whole number is one, a fraction up to 1.0 is of the rows (at least one)."""
    if isinstance(size, bool) or not isinstance(size, int | float | np.integer | np.floating):
        raise UserError(f"a budget is a whole number of items or a fraction of them, not {size!r}")
    if 0 < size < 1 or (size == 1 and isinstance(size, float | np.floating)):
        return max(1, round(float(size) * rows))
    if not math.isfinite(size) or size != int(size):
        raise UserError(f"a budget of {size}: give a whole number of items, or a fraction between 0 and 1")
    if size < 1:
        raise UserError(f"a budget of {int(size)} picks nothing: it must be at least 1")
    if size > rows:
        raise UserError(f"a budget of {int(size)} is larger than the pool of {rows}: lower it or add rows")
    return int(size)


def _quota_counts(name: str, quotas: Quotas, sources: Collection[str], size: int | None) -> dict[str, float]:
    if unknown := [source for source in quotas if source != OTHERS and source not in sources]:
        raise UserError(
            f"there is a {name} for source {unknown[0]!r}, and no such source: there are {', '.join(sorted(sources))}"
        )
    counts: dict[str, float] = {}
    for source in sources:
        value = quotas.get(source, quotas.get(OTHERS))
        if value is not None and size is not None and 0 < value < 1:
            value = math.ceil(value * size - 1e-9) if name == "minimum" else math.floor(value * size + 1e-9)
        if value is not None:
            counts[source] = value
    return counts


@dataclass(eq=False)
class BudgetState:
    """What may still be picked; items only ever become ineligible."""

    eligible: np.ndarray  # (N,) bool: what may be picked next
    left: int  # how many items may still be picked at most
    tokens: float | None  # what they may cost together
    costs: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) int64: the source of each
    least: np.ndarray  # (sources,) how many of each still have to be picked
    most: np.ndarray  # (sources,) how many of each still may be picked
    min_log_gain: float = -math.inf  # no pick may add less

    def __post_init__(self) -> None:
        for group in np.flatnonzero(self.most <= 0):
            self.eligible[self.groups == group] = False
        self._restrict()

    @property
    def full(self) -> bool:
        """Whether the budget is used up: no item more, or none that costs so little."""
        return self.left == 0 or (self.tokens is not None and not self.eligible.any())

    @property
    def at_most(self) -> int:
        """An upper bound on the number of picks that are still possible."""
        count = min(self.left, int(self.eligible.sum()))
        if self.tokens is None:
            return count
        cheapest = np.cumsum(np.sort(self.costs[self.eligible]))
        return min(count, int(np.searchsorted(cheapest, self.tokens, side="right")))

    @property
    def limits(self) -> tuple[float | None, np.ndarray]:
        """What the next pick may cost at most, and of which sources it may be, (sources,) bool."""
        owed = bool(self.least.any()) and self.left <= self.least.sum()
        return self.tokens, (self.most > 0) & ((self.least > 0) | (not owed))

    def spend(self, index: int) -> None:
        """Take a pick off what is left."""
        group = self.groups[index]
        self.eligible[index] = False
        self.left -= 1
        if self.tokens is not None:
            self.tokens -= float(self.costs[index])
        self.most[group] -= 1
        if self.most[group] <= 0:
            self.eligible[self.groups == group] = False
        if self.least[group] > 0:
            self.least[group] -= 1
        self._restrict()

    def add_items(self, groups: np.ndarray, costs: np.ndarray, eligible: bool = True) -> None:
        """Put n items behind the others: such as meet the ``limits``, or that are not eligible."""
        self.eligible = np.concatenate([self.eligible, np.full(len(groups), eligible)])
        self.groups = np.concatenate([self.groups, groups])
        self.costs = np.concatenate([self.costs, costs])

    def why_nothing(self) -> str:
        """Why nothing is eligible though the budget is not used up."""
        return "the maxima of the sources leave nothing to pick" if np.isfinite(self.most).any() else "no item is left"

    def _restrict(self) -> None:
        if self.tokens is not None:
            self.eligible &= self.costs <= self.tokens
        # What is left is owed to the minima: only their sources may be picked.
        if self.least.any() and self.left <= self.least.sum():
            self.eligible &= (self.least > 0)[self.groups]


def in_order(state: BudgetState, order: Iterable[int], progress: Progress | None = None) -> list[int]:
    """Pick what is eligible, in this order, until the budget is used up; ``progress`` gets NaN log gains."""
    picks: list[int] = []
    for index in order:
        if state.full:
            break
        if state.eligible[index]:
            state.spend(int(index))
            picks.append(int(index))
            if progress is not None:
                progress(len(picks), math.nan)
    return picks
