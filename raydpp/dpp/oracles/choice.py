"""Which oracle runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from raydpp.dpp import OracleName
from raydpp.dpp.kernels import MIN_RIDGE, Kernel
from raydpp.dpp.oracles import Oracle
from raydpp.errors import UserError

if TYPE_CHECKING:  # what follows is needed before torch is imported, to refuse a mistake at once
    from raydpp.dpp.features import UnitRows
    from raydpp.dpp.oracles.bounds import BoundedOracle

_SMALL = 100_000  # residuals updated one by one in less time than a working set costs


def choose_oracle(name: OracleName, kernel: Kernel, rows: int, dimension: int, size: int) -> OracleName:
    """The oracle that ``auto`` means for a problem; any other name is returned as it is.

    ``textbook`` where N M is small, ``feature-space`` for cosine with a ridge where it costs less than ``cholesky``,
    which takes all else. Of the operations that one has and the other has not, N M^2 and M^3 grow with the picks; 0.6
    N M D and 8 M D^2, in float64, with the dimension (``tests/benchmarks/selection.py --parts dimensions``).
    """
    if name not in get_args(OracleName):
        raise UserError(f"there is no oracle {name!r}: use one of {', '.join(get_args(OracleName))}")
    if name != "auto":
        return name
    if rows * size <= _SMALL:
        return "textbook"
    has_ridge = kernel.name == "cosine" and (kernel.ridge or 0.0) >= MIN_RIDGE
    if has_ridge and (rows + size) * size >= 0.6 * rows * dimension + 8 * dimension**2:
        return "feature-space"
    return "cholesky"


def choose_sharded_oracle(name: OracleName, kernel: Kernel, rows: int, dimension: int, size: int) -> OracleName:
    """The oracle for rounds: as ``choose_oracle``, but for the textbook one, which cannot wait for a round."""
    chosen = choose_oracle(name, kernel, rows, dimension, size)
    if name == "textbook":
        raise UserError("exact rounds over many shards have no textbook oracle: use cholesky, feature-space or auto")
    return "cholesky" if chosen == "textbook" else chosen


def make_oracle(name: OracleName, rows: UnitRows, kernel: Kernel, size: int) -> Oracle:
    """An oracle by its name, for at most ``size`` picks."""
    if name == "textbook":
        from raydpp.dpp.oracles.textbook import TextbookOracle

        return TextbookOracle(rows, kernel, size)
    return bounded_oracle(name)(rows, kernel, size)


def bounded_oracle(name: OracleName) -> type[BoundedOracle]:
    """The class of ``cholesky`` or ``feature-space``."""
    from raydpp.dpp.oracles.cholesky import CholeskyOracle
    from raydpp.dpp.oracles.feature_space import FeatureSpaceOracle

    return FeatureSpaceOracle if name == "feature-space" else CholeskyOracle
