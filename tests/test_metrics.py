from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raydpp import metrics
from raydpp.extract.stage import extract
from raydpp.select.stage import select

ROOT = Path(__file__).parents[1]


def exported() -> Counter[Any]:
    """What the metrics port of this machine's Ray node shows: (counter, stage, out) -> its sum over processes."""
    import ray

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        text = page.read().decode()
    found: Counter[Any] = Counter()
    for name, labels, value in re.findall(r"^ray_raydpp_(\w+)_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found.update({(name, tags["stage"], tags["out"]): float(value)})
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_node_exports_what_was_done(cluster: None, corpus: str, tiny_model: str, tmp_path: Path) -> None:
    extracted = extract(corpus, str(tmp_path / "points"), tiny_model, dimension=64, rows_per_file=8)
    select(extracted.out, str(tmp_path / "taken"), 7, partitions=2, exact=True, redundancy="never")
    ends = time.monotonic() + 60
    while ("picks", "select", "taken") not in (found := exported()) and time.monotonic() < ends:
        time.sleep(1)
    counts, timings = extracted.record["counts"], extracted.record["timings"]
    assert counts["rows"] == 40
    assert found["rows", "extract", "points"] == counts["rows"]
    assert found["tokens", "extract", "points"] == timings["tokens"]
    assert found["rejects", "extract", "points"] == counts["rejects"]
    busy, lived = (found[name, "extract", "points"] for name in ("model_seconds", "actor_seconds"))
    assert busy == pytest.approx(timings["model_seconds"])
    assert 0 < busy < lived
    assert found["picks", "select", "taken"] == 7
    assert 0 < found["rounds", "select", "taken"] <= 7


class Recorded:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def inc(self, more: float, tags: dict[str, str]) -> None:
        self.calls.append((more, dict(tags)))


def test_a_count_has_the_stage_and_the_folder_as_tags(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Recorded()
    monkeypatch.setattr(metrics, "_counter", lambda name: counter)
    metrics.label("extract", "table")
    metrics.count("rows", 3)
    metrics.count("rows", 0)  # Ray refuses it
    metrics.label("select", "subset")
    metrics.count("rows", 0.5)
    tags = [{"stage": "extract", "out": "table"}, {"stage": "select", "out": "subset"}]
    assert counter.calls == [(3, tags[0]), (0.5, tags[1])]


@pytest.mark.parametrize("ray", [None, "not initialised"])
def test_without_ray_nothing_is_counted(ray: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        @staticmethod
        def is_initialized() -> bool:
            return False

    monkeypatch.setattr(metrics, "_counter", pytest.fail)
    if ray is None:
        monkeypatch.delitem(sys.modules, "ray", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "ray", Idle)
    metrics.count("rows", 1)


def test_the_dashboard_shows_every_counter_and_no_other() -> None:
    board = json.loads((ROOT / "jobs" / "grafana" / "raydpp.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert shown == {f"ray_raydpp_{name}_total" for name in metrics.COUNTERS}
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {f"${{{name}}}" for name in variables}
    assert all(query.count("(") == query.count(")") for query in queries)
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_every_counter_is_counted_somewhere() -> None:
    sources = [path.read_text() for path in (ROOT / "raydpp").rglob("*.py") if path.name != "metrics.py"]
    counted = {name for text in sources for name in re.findall(r'\bcount\("(\w+)"', text)}
    from raydpp.extract.workers import COUNTS

    assert counted | {"rows", "rejects"} <= metrics.COUNTERS.keys()
    assert counted | set(COUNTS) >= metrics.COUNTERS.keys()
