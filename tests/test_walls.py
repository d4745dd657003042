"""What may import what: engines know neither Ray nor a stage, and the road has one direction."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"ingest", "warmup", "extract", "select", "measure", "refresh"}
MAY_USE = {
    "measure": {"select"},
    "select": {"ingest"},
    "warmup": {"extract"},
    "refresh": STAGES,
    "demo": STAGES,
}  # a stage, and the other ones it is made of
WITH_RAY = {
    "cluster",
    "metrics",
    "progress",
    "ingest.stage",
    "extract.workers",
    "extract.isolation",
    "select.shard_actors",
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "raydpp").rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The modules that a module imports, wherever in its text: ours as they are called, of others the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = {name if name in MODULES else name.rpartition(".")[0] for name in found if name.startswith("raydpp")}
    return ours | {name.split(".")[0] for name in found if not name.startswith("raydpp")}


def place(name: str) -> str:
    """The folder, or file, below raydpp/ that a module belongs to; empty for other packages."""
    return name.split(".")[1] if name.startswith("raydpp.") else ""


def below(*folders: str) -> list[str]:
    return [name for name in MODULES if place(name) in folders]


@pytest.mark.parametrize("name", below("dpp", "diversity"))
def test_selection_and_measures_know_arrays_alone(name: str) -> None:
    assert not imports(name) & {"ray", "pyarrow", "fsspec", "transformers", "peft"}
    assert {place(other) for other in imports(name)} <= {"", "dpp", "diversity", "errors"}


@pytest.mark.parametrize("name", below("gradients"))
def test_gradients_know_neither_ray_nor_a_stage(name: str) -> None:
    assert not imports(name) & {"ray", "pyarrow", "fsspec"}
    assert {place(other) for other in imports(name)} <= {"", "gradients", "errors"}
    if name.rpartition(".")[2] not in ("model", "adapters"):
        assert not imports(name) & {"transformers", "peft"}


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_uses_another_one_only_where_it_is_made_of_it(name: str) -> None:
    used = {place(other) for other in imports(name)} & STAGES
    assert used <= {place(name)} | MAY_USE.get(place(name), set())


@pytest.mark.parametrize("name", ["raydpp.runs", "raydpp.storage", "raydpp.tables", *below("report")])
def test_what_all_share_knows_no_engine(name: str) -> None:
    assert not {place(other) for other in imports(name)} & {"gradients", "dpp", "diversity"}


def test_ray_is_imported_where_the_tree_says_so_and_nowhere_else() -> None:
    assert {name.removeprefix("raydpp.") for name in MODULES if "ray" in imports(name)} == WITH_RAY


def test_no_import_leads_back_to_where_it_came_from() -> None:
    graph = {name: {other for other in imports(name) if other in MODULES} for name in MODULES}
    TopologicalSorter(graph).prepare()


def unsafe(source: str) -> list[str]:
    """The calls in a module's text that may run what a file holds."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        named = [ast.unparse(call.func), *(ast.unparse(one) for one in call.args[:1])]  # functools.partial's too
        if any(name.endswith((".from_pretrained", ".from_config")) for name in named) and "PeftModel" not in named[0]:
            wanted = None in given or ast.unparse(given.get("trust_remote_code", ast.Constant(None))) == "False"
        elif named[0] == "torch.load":
            wanted = ast.unparse(given.get("weights_only", ast.Constant(None))) == "True"
        elif named[0] == "yaml.load":
            wanted = len(call.args) == 2 and ast.unparse(call.args[1]) == "_Loader"
        else:
            risky = r"eval|exec|yaml\.(unsafe|full)_load|(\w+\.)*(\w*pickle|joblib|np|numpy)\.loads?"
            wanted = not re.fullmatch(risky, named[0])
        if not wanted:
            found.append(ast.unparse(call))
    return found


def test_nothing_that_a_user_names_is_run() -> None:
    found = {name: calls for name, path in MODULES.items() if (calls := unsafe(path.read_text()))}
    # between a process and the child that it starts
    assert found == {"raydpp.extract.isolation": ["cloudpickle.loads(load)"]}


@pytest.mark.parametrize(
    "call",
    [
        "AutoModel.from_pretrained(name)",
        "functools.partial(kind.from_pretrained, name, trust_remote_code=True)",
        "AutoConfig.from_config(config, trust_remote_code=trust)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "pickle.load(file)",
        "np.load(file)",
        "eval(text)",
    ],
)
def test_what_would_run_is_seen(call: str) -> None:
    assert unsafe(call)


def test_the_walls_can_be_hit() -> None:
    assert "ray" in imports("raydpp.select.shard_actors")
    assert "transformers" in imports("raydpp.gradients.model")
    assert "raydpp.select.stage" in imports("raydpp.demo")
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
