from __future__ import annotations

import pytest

from raydpp.select import exact
from tests.select.spread import ShardsHere


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards in this process: what actors add has tests of its own."""
    monkeypatch.setattr(exact, "ShardActors", ShardsHere)
    monkeypatch.setattr(exact, "memory_for", lambda needed, what: needed)
