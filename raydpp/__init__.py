"""raydpp: how diverse is an instruction dataset, and which subset of it is worth training on.

From Python, without Ray: ``greedy_map`` selects, ``log_det_distance`` measures. The stages (``raydpp.stages``) and the
``raydpp`` command do both on files of any size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydpp.diversity.distance import LogDetDistance, log_det_distance
    from raydpp.selection.greedy import greedy_map
    from raydpp.selection.picking import Selection

__version__ = "0.1.0"
__all__ = ["LogDetDistance", "Selection", "greedy_map", "log_det_distance"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds, and ``raydpp --help`` needs none of it."""
    if name in ("greedy_map", "Selection"):
        from raydpp.selection import greedy as module
    elif name in ("log_det_distance", "LogDetDistance"):
        from raydpp.diversity import distance as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
