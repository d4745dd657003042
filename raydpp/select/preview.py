"""What a handful of gammas and quality weights would select, from a sample, before anything is searched in earnest."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.scale import median_gamma, residual_spread
from raydpp.progress import progress_bar
from raydpp.report.figures import gains_figure, mix_figure
from raydpp.report.html import Section, render
from raydpp.report.table import Table
from raydpp.runs import PREVIEW, RunResult
from raydpp.select.compare import mix_in_words, source_mix
from raydpp.select.inputs import SelectionJob
from raydpp.select.request import Request, numbers, select_rows
from raydpp.storage import Folder
from raydpp.tables import GradientTable, vectors

SAMPLE = 2_000
"""Examples that are selected from."""

TIMES = (0.25, 1.0, 4.0)
"""The gammas shown, in those that the data give."""

WEIGHTS = (0.0, 0.25, 0.5, 0.75)

_ALIKE = 0.3  # gammas that differ by less select about the same
_FEWEST = 100  # picks, if so many are wanted: of fewer a mix says little


def preview(job: SelectionJob, rows: int, spread: bool, out: str) -> RunResult:
    """Select from a sample by several objectives; the record holds one entry each, OUT/preview.html shows them.

    Args:
        job: Of files that hold the sample, with the objective asked for, beside which the others are put.
        rows: How many the whole table has.
        spread: Whether the unit of quality is the spread of log residuals.
        out: The folder of the selection to come, which may hold nothing else yet.
    """
    began, tasks, asked = time.monotonic(), job.tasks, job.request.objective
    count = min(SAMPLE, job.table.rows)
    sample = tasks.submit(_sample, job.table, job.request, job.given.excluded)
    request = _scaled(job.request, count, rows)
    kernels = [asked.kernel]
    if asked.kernel.name == "rbf":
        own, auto = asked.kernel.gamma, tasks.get(tasks.submit(_gamma, sample, request.column))
        others = [float(f"{times * auto:.2g}") for times in TIMES]
        gammas = sorted([own, *(gamma for gamma in others if not math.isclose(gamma, own, rel_tol=_ALIKE))])
        kernels = [replace(asked.kernel, gamma=gamma) for gamma in gammas]
    weights = sorted({asked.quality_weight, *(WEIGHTS if request.quality else (0.0,))})
    found = []
    with progress_bar("preview", len(kernels) * len(weights), "selections") as bar:
        for kernel in kernels:
            unit = tasks.submit(_unit, sample, request, kernel) if spread and request.quality else 1.0
            running = [tasks.submit(_selected, sample, request, kernel, w, unit, job.given.features) for w in weights]
            for one in tasks.as_completed(running):
                found.append(one)
                bar.update()
    found.sort(key=lambda one: (one["gamma"] or 0.0, one["weight"]))
    own_key = _gamma_of(asked.kernel), asked.quality_weight
    mine = next(one for one in found if (one["gamma"], one["weight"]) == own_key)
    for one in found:
        one["shared"] = len(one["ids"] & mine["ids"]) / max(1, len(mine["ids"]))
    pairs = itertools.combinations(range(len(found)), 2)
    overlaps = {f"{i} {j}": len(found[i]["ids"] & found[j]["ids"]) / max(1, found[i]["examples"]) for i, j in pairs}
    picked = mine["examples"]
    shown = preview_table(found, f"What {picked:,} of a sample of {count:,} examples would be")
    summary = (
        f"preview: {len(found)} selections of {picked:,} of a sample of {count:,} of {rows:,} examples of"
        f" {job.table.name}, in {time.monotonic() - began:.0f} s; nothing was selected yet"
    )
    folder = Folder.at(out)
    folder.write_text(PREVIEW, report(found, mine, shown, summary))
    records = [{name: value for name, value in one.items() if name not in ("ids", "log_gains")} for one in found]
    record = {"stage": "select", "preview": records, "overlaps": overlaps, "tables": [shown.record]}
    return RunResult(folder.url, record | {"paths": [folder.url_of(PREVIEW)]}, summary)


def preview_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each selection, by gamma and weight."""
    columns = {
        "gamma": "gamma",
        "weight": "quality weight",
        "last_log_gain": "last log gain",
        "quality": "quality",
        "median_tokens": "median tokens",
        "shared": "shared with yours",
    }
    names = [name for name in columns if any(one[name] is not None for one in found)]
    rows = [[*(one[name] for name in names), mix_in_words(one["sources"])] for one in found]
    return Table(title, [*(columns[name] for name in names), "source mix"], rows)


def report(found: Sequence[Mapping[str, Any]], mine: Mapping[str, Any], shown: Table, lead: str) -> str:
    """preview.html."""
    diverse = {f"gamma {one['gamma']:g}" if one["gamma"] else "cosine": one for one in found if not one["weight"]}
    weighed = {f"quality weight {one['weight']:g}": one for one in found if one["gamma"] == mine["gamma"]}
    sections = [
        Section(
            "Side by side",
            "Last log gain: what the last pick adds, in nats; near 0 every example counts as new, far below as known."
            " Quality: the mean of the scores, standardised. Shared with yours: of the picks by the options given.",
            shown,
        ),
        Section(
            "Gamma",
            "What each pick adds, without quality.",
            figures=[gains_figure({name: one["log_gains"] for name, one in diverse.items()})],
        ),
        Section(
            "Quality weight",
            "Where the picks come from.",
            figures=[mix_figure({name: one["sources"] for name, one in weighed.items()})],
        ),
    ]
    return render("Preview of a selection", lead, sections)


def _scaled(request: Request, count: int, rows: int) -> Request:
    """What to ask of ``count`` examples that stand for ``rows``."""
    part, asked = count / rows, request.budget
    size = asked.size and max(round(part * asked.size), min(_FEWEST, asked.size))
    quotas = [{source: round(part * n) for source, n in one.items()} for one in (asked.minimum, asked.maximum)]
    budget = replace(asked, tokens=asked.tokens and part * asked.tokens, minimum=quotas[0], maximum=quotas[1])
    return replace(request, budget=replace(budget, size=size and min(size, count)))


def _sample(table: GradientTable, request: Request, excluded: pa.Array) -> pa.Table:
    wanted = {*request.columns, *([request.cost] if table.has(request.cost) else [])}
    rows = table.read(table.parts, sorted(wanted))
    rows = rows.filter(pc.invert(pc.is_in(rows["id"], excluded)))
    return rows.take(pa.array(np.sort(np.random.default_rng(0).permutation(len(rows))[:SAMPLE])))


def _gamma(sample: pa.Table, column: str) -> float:
    return median_gamma(vectors(sample[column]))


def _unit(sample: pa.Table, request: Request, kernel: Kernel) -> float:
    return residual_spread(vectors(sample[request.column]), int(request.budget.size or len(sample)), kernel)


def _selected(
    sample: pa.Table, request: Request, kernel: Kernel, weight: float, unit: float, owned: np.ndarray | None
) -> dict[str, Any]:
    """What one objective selects from the sample."""
    request = replace(request, objective=Objective(kernel, weight, unit))
    picks, selection = select_rows(sample, request, owned=owned)
    scores = request.scores(picks)
    tokens = numbers(picks, request.cost) if request.cost in picks.column_names else np.empty(0)
    return {
        "gamma": _gamma_of(kernel),
        "weight": weight,
        "unit": unit,
        "examples": len(picks),
        "last_log_gain": float(selection.log_gains[-1]) if len(picks) else None,
        "quality": None if scores is None or not len(picks) else float(scores.mean()),
        "median_tokens": float(np.median(tokens)) if len(tokens) else None,
        "sources": source_mix(picks),
        "log_gains": selection.log_gains.tolist(),
        "ids": set(picks["id"].to_pylist()),
    }


def _gamma_of(kernel: Kernel) -> float | None:
    return kernel.gamma if kernel.name == "rbf" else None
