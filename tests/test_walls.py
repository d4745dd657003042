"""What may import what: the mathematics knows neither Ray nor a stage."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raydpp"
PURE = sorted(
    path for folder in ("corpus", "selection", "diversity", "extraction") for path in (PACKAGE / folder).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", PURE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_mathematics_imports_neither_ray_nor_a_stage(path: Path) -> None:
    found = imports(path)
    assert not {name for name in found if name.split(".")[0] == "ray" or name.startswith("raydpp.stages")}
    if path.stem not in ("model", "adapters"):
        assert not {name for name in found if name.split(".")[0] in ("transformers", "peft")}


def test_the_wall_can_be_hit() -> None:
    assert "ray.data" not in imports(PACKAGE / "stages" / "select.py")
    assert "ray" in imports(PACKAGE / "stages" / "distributed.py")
    assert "transformers" in imports(PACKAGE / "extraction" / "model.py")
