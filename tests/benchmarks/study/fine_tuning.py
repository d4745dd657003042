"""The loss on held-out rows after fine-tuning on what each method selects, and how diversity goes with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import vl_convert
from scipy.stats import bootstrap, spearmanr, ttest_ind
from tqdm import tqdm

from raydpp import log_det_distance
from raydpp.gradients.tokenization import TokenizedExample
from tests.benchmarks.printed import table

from .data import Study
from .selections import DRAWS, selections
from .training import FineTuning, Recipe, frozen_inputs

BUDGETS = ("examples", "response tokens")
_RECIPE = Recipe()
_FEW = 8  # sets, of fewer of which a correlation has no interval


def run(study: Study, out: Path, seeds: int, workers: int) -> pd.DataFrame:
    """Every training that OUT/runs.jsonl does not have yet, those with few seeds first; all that it has then.

    Returns:
        A row a training: pool, budget, method, seed, ids, and the loss of every source in nats a response token.
    """
    file, done, jobs = out / "runs.jsonl", {}, {}
    if file.exists():
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # not cut off
                found = json.loads(line)
                done[found["key"]] = found
    for job in _jobs(study, out, seeds):
        jobs[hashlib.blake2b(json.dumps([job, astuple(_RECIPE)]).encode(), digest_size=16).hexdigest()] = job
    ids = list(study.rows.index)
    place = {one: n for n, one in enumerate(ids)}
    held = [place[one] for one in study.ids("held-out")]
    owners = study.rows.source.iloc[held].to_numpy()
    examples = study.tokenized(ids)
    lengths = np.array([examples[n].response[1:].sum() for n in held])
    missing = [key for key in jobs if key not in done] if workers else []
    if missing:
        hidden = out / "hidden.npy"
        frozen_inputs(study.model, examples, _RECIPE, hidden)
        with (
            ProcessPoolExecutor(workers, get_context("spawn"), _begin, (study.model, examples, hidden)) as pool,
            file.open("a") as lines,
        ):
            futures = {
                pool.submit(_train, [place[one] for one in jobs[key]["ids"]], held, jobs[key]["seed"]): key
                for key in missing
            }
            for future in tqdm(as_completed(futures), "trainings", len(futures), unit="run"):
                key, losses = futures[future], future.result()  # (held,) nats
                by_source = {
                    source: losses[owners == source].sum() / lengths[owners == source].sum() for source in study.sources
                }
                done[key] = {"key": key, **jobs[key], "losses": by_source}
                lines.write(json.dumps(done[key]) + "\n")
                lines.flush()
    rows = pd.DataFrame([done[key] for key in jobs if key in done])
    losses = pd.DataFrame(list(rows.pop("losses")), index=rows.index)
    return rows.join(losses).assign(loss=losses.mean(axis=1))


def _jobs(study: Study, out: Path, seeds: int) -> list[dict[str, Any]]:
    """Trainings in the order in which they are wanted: first no training, then by budget and seed."""
    file = out / "selections.json"
    pools = study.pools()
    if not file.exists():
        found = {
            f"{pool} {budget}": selections(study, ids, tokens=budget != "examples")
            for pool, ids in pools.items()
            for budget in BUDGETS
        }
        file.write_text(json.dumps(found))
    chosen = json.loads(file.read_text())
    jobs = [{"pool": "", "budget": "", "method": "none", "seed": 0, "ids": []}]
    for budget in BUDGETS:
        for seed in range(seeds):
            for pool in pools:
                for method, ids in chosen[f"{pool} {budget}"].items():
                    name, _, draw = method.rpartition(" ")
                    if name == "random" and int(draw) * seeds // DRAWS != seed:
                        continue  # each draw is trained on once
                    jobs.append({"pool": pool, "budget": budget, "method": method, "seed": seed, "ids": ids})
    return jobs


_tuning: FineTuning


def _begin(model: str, examples: Sequence[TokenizedExample], hidden: Path) -> None:
    global _tuning
    torch.set_num_threads(1)
    _tuning = FineTuning(model, frozen_inputs(model, examples, _RECIPE, hidden), _RECIPE)


def _train(train: Sequence[int], held: Sequence[int], seed: int) -> np.ndarray:
    return _tuning.losses(train, held, seed)


def report(study: Study, runs: pd.DataFrame, out: Path) -> None:
    """Print the losses of each pool and budget beside random sets', and how the distance of sets goes with them.

    OUT/loss.svg draws the latter.
    """
    before = runs[runs.method == "none"]
    runs = runs[runs.method != "none"].assign(
        kind=runs.method.str.replace(r"^random \d+$", "random", regex=True), set=runs.pool + runs.budget + runs.method
    )
    print(f"\nBefore training: {before.loss.mean():.4f} nats a token, the mean of {len(study.sources)} sources")
    points = []
    for (budget, pool), group in runs.groupby(["budget", "pool"], sort=False):
        print(f"\nEqual {budget}, the {pool} pool: loss on held-out rows, nats a token, the mean of sources\n")
        random = group[group.kind == "random"]
        lines = []
        for kind, found in sorted(group.groupby("kind"), key=lambda one: one[1].loss.mean()):
            ids = found.ids.iloc[0]
            spread = f" ± {found.loss.std():.4f}" if len(found) > 1 else ""
            cells = [f"{found.loss.mean():.4f}{spread} ({len(found)})", _difference(found, random)]
            other = found[study.sources].drop(columns=study.redundant).mean(axis=1).mean()
            owned = sum(study.rows.source.loc[ids] == study.redundant)
            tokens = study.rows.response_tokens.loc[ids]
            cells += [f"{found[study.redundant].mean():.3f}", f"{other:.3f}"]
            lines.append([str(kind), *cells, f"{len(ids)}", f"{owned}", f"{tokens.sum():,}"])
        headings = ["method", "loss (trainings)", "less random [95 %]", "on the redundant source", "on the others"]
        table([*headings, "examples", "of the redundant source", "response tokens"], lines)
        most = min(map(len, group.ids))
        for _, found in group.groupby("set"):
            at = {
                space: log_det_distance(study.vectors(space, found.ids.iloc[0]), most, subset="uniform", draws=5).mean
                for space in study.features
            }
            kind = found.kind.iloc[0]
            points.append({"budget": budget, "pool": pool, "method": kind, "loss": found.loss.mean(), **at})
    print("\nSpearman's correlation of the distance of a training set (gamma 1) and its loss [95 %, bootstrap]\n")
    every = pd.DataFrame(points)
    (out / "loss.svg").write_text(vl_convert.vegalite_to_svg(_scatter(every, list(study.features))))
    groups = [*every.groupby(["budget", "pool"], sort=False), *every.groupby(["budget"], sort=False)]
    lines = []
    for name, found in groups:
        cells = [_correlation(found[space], found.loss) for space in study.features]
        lines.append([", ".join(map(str, name)), f"{len(found)}", *cells])
    table(["sets", "number", *study.features], lines)


def _scatter(points: pd.DataFrame, spaces: Sequence[str]) -> dict[str, Any]:
    """A panel for each space: the distance of a training set, and the loss after it."""
    loss = {"field": "loss", "type": "quantitative", "scale": {"zero": False}, "title": "held-out loss, nats a token"}
    shared = {"y": loss, "color": {"field": "pool", "type": "nominal"}, "shape": {"field": "budget", "type": "nominal"}}
    label = {
        "mark": {"type": "text", "dx": 5, "align": "left", "fontSize": 8},
        "encoding": {"text": {"field": "method"}},
    }
    panels = []
    for space in spaces:
        at = {"field": space, "type": "quantitative", "scale": {"zero": False}, "title": "log-det distance"}
        layers = [{"mark": {"type": "point", "filled": True, "size": 40}}, label]
        panel = {"title": space, "width": 300, "height": 260, "layer": layers, "encoding": {**shared, "x": at}}
        panels.append(panel)
    return {"data": {"values": points.to_dict("records")}, "hconcat": panels, "background": "white"}


def _difference(found: pd.DataFrame, random: pd.DataFrame) -> str:
    """Of the mean losses, with Welch's interval."""
    if set(found.kind) == {"random"}:
        return ""
    if min(len(found), len(random)) < 2:
        return f"{found.loss.mean() - random.loss.mean():+.4f}"
    interval = ttest_ind(found.loss, random.loss, equal_var=False).confidence_interval()
    return f"{found.loss.mean() - random.loss.mean():+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _correlation(distances: pd.Series, losses: pd.Series) -> str:
    def spearman(x: np.ndarray, y: np.ndarray) -> float:
        return float(spearmanr(x, y).statistic)

    pairs = (distances.to_numpy(), losses.to_numpy())
    if len(distances) < _FEW:
        return f"{spearman(*pairs):+.2f}"
    found = bootstrap(pairs, spearman, paired=True, vectorized=False, method="percentile", n_resamples=2000, rng=0)
    low, high = found.confidence_interval
    return f"{spearman(*pairs):+.2f} [{low:+.2f}, {high:+.2f}]"
