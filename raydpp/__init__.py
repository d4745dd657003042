"""raydpp: how diverse is an instruction dataset, and which subset of it is worth training on.

From Python, without Ray: ``greedy_map`` selects, ``log_det_distance`` measures. The ``raydpp`` command,
whose stages are the folders ``ingest``, ``extract``, ``select`` and ``measure``, does both on files of any size.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydpp.diversity.distance import LogDetDistance, log_det_distance
    from raydpp.dpp.greedy import greedy_map
    from raydpp.dpp.lazy_greedy import Selection

__version__ = "0.1.0"
__all__ = ["LogDetDistance", "Selection", "greedy_map", "log_det_distance"]


_HOMES = {
    "greedy_map": "raydpp.dpp.greedy",
    "Selection": "raydpp.dpp.lazy_greedy",
    "log_det_distance": "raydpp.diversity.distance",
    "LogDetDistance": "raydpp.diversity.distance",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds, and ``raydpp --help`` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
