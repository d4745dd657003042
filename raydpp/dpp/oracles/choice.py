"""Which oracle runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles import Oracle
from raydpp.dpp.oracles.cholesky import CholeskyPool
from raydpp.dpp.oracles.factor import Factor
from raydpp.dpp.oracles.feature_space import MIN_RIDGE, FeatureSpace, Posterior
from raydpp.dpp.oracles.textbook import Textbook
from raydpp.errors import UserError

OracleName = Literal["auto", "textbook", "cholesky", "feature-space"]

_SMALL = 100_000  # residuals updated one by one in less time than a front costs


def choose_oracle(name: OracleName, kernel: Kernel, rows: int, dimension: int, size: int) -> OracleName:
    """The oracle that ``auto`` means for a problem; any other name is returned as it is.

    ``textbook`` where N M is small, ``feature-space`` for cosine with a ridge unless M is small beside D,
    ``cholesky`` for all else.

    Raises:
        UserError: An unknown name.
    """
    if name not in get_args(OracleName):
        raise UserError(f"there is no oracle {name!r}: use one of {', '.join(get_args(OracleName))}")
    if name != "auto":
        return name
    if rows * size <= _SMALL:
        return "textbook"
    if kernel.name == "cosine" and (kernel.ridge or 0.0) >= MIN_RIDGE and 4 * size >= dimension:
        return "feature-space"
    return "cholesky"


def make_oracle(name: OracleName, rows: UnitRows, kernel: Kernel, size: int) -> Oracle[Any]:
    """An oracle by its name, for at most ``size`` picks."""
    makers: dict[str, Callable[[], Oracle[Any]]] = {
        "textbook": lambda: Textbook(rows, kernel, size),
        "cholesky": lambda: CholeskyPool(rows, kernel, size),
        "feature-space": lambda: FeatureSpace(rows, kernel),
    }
    return makers[choose_oracle(name, kernel, len(rows), rows.dimension, size)]()


def oracle_of_rounds(name: OracleName, kernel: Kernel, rows: int, dimension: int, size: int) -> OracleName:
    """The oracle for rounds: as ``choose_oracle``, but for the textbook one, which cannot wait for a round."""
    chosen = choose_oracle(name, kernel, rows, dimension, size)
    if name == "textbook":
        raise UserError("exact rounds over many shards have no textbook oracle: use cholesky, feature-space or auto")
    return "cholesky" if chosen == "textbook" else chosen


def make_given(name: OracleName, rows: UnitRows, kernel: Kernel, size: int) -> Factor | Posterior:
    """What is known of rows, exactly, given at most ``size`` picks: by the oracle's name, without its bounds."""
    return Posterior(rows, kernel) if name == "feature-space" else Factor(rows, kernel, size)
