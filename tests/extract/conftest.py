from __future__ import annotations

import pytest

from raydpp.extract import isolation


@pytest.fixture(autouse=True, scope="session")
def light_model_processes() -> None:
    """No model is loaded in a child of this process, which so needs no libraries; actors have theirs."""
    isolation._LIBRARIES[:] = ["raydpp.extract.isolation"]
