"""The selection engine: greedy MAP inference of a determinantal point process. Arrays in, arrays out.

What a problem is: ``kernels``, ``objective``, ``budget``, ``features``. One search: ``greedy`` and its loop
``lazy_greedy``, over ``oracles`` on one machine or over ``sharded`` items on many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

KernelName = Literal["rbf", "cosine"]
OracleName = Literal["auto", "textbook", "cholesky", "feature-space"]
BaselineName = Literal[
    "random", "quality", "length", "k-center", "k-means", "facility-location", "dedup", "round-robin"
]

Progress = Callable[[int, float], None]
"""Called after each pick with the number of picks and the pick's log gain."""
