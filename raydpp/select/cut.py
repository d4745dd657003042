"""cut: a finished selection -> the selection for a smaller budget, without a new search."""

from __future__ import annotations

import json
import logging
from collections import Counter

from raydpp import runs
from raydpp.dpp.budget import count_of
from raydpp.errors import UserError
from raydpp.select.outputs import EXAMPLES, Distances, write_dataset
from raydpp.storage import Folder, absolute
from raydpp.tables import GRADIENTS, SELECTION_SCHEMA, parquet_parts, read_columns, write_table

log = logging.getLogger(__name__)


def cut(selection: str, out: str, size: int | float) -> runs.RunResult:
    """Take the first SIZE picks of a selection: greedy is nested, so they are the selection for that budget.

    Needs no search, no model and no cluster. Works on what raydpp select wrote, finished or ended by Ctrl-C, and on
    what raydpp cut wrote. A selection made with --min-per-source or --tokens keeps room for what comes later, so a
    part of it is not what a smaller budget would have given: these are refused.

    Args:
        selection: Output folder of raydpp select.
        out: Folder to write; it must be new, empty, or this same run's.
        size: How many examples: a whole number, or a fraction of the selection such as 0.5.
    """
    selection, out = absolute(selection), absolute(out)
    source = Folder.at(selection)
    record = runs.load_finished(["select", "cut"], source, interrupted=True)
    options = {"minimum": "--min-per-source", "tokens": "--tokens"}
    if used := [option for name, option in options.items() if record["nested_unless"].get(name)]:
        raise UserError(f"{selection} was selected with {used[0]}: its parts are not selections; run raydpp select")
    picks = read_columns(parquet_parts(source.below("selection")), SELECTION_SCHEMA.names)
    try:
        count = count_of(size, len(picks))
    except UserError as error:
        raise UserError(f"--size {size} of {selection}: {error}") from error
    run = runs.begin("cut", {"selection": selection, "out": out, "size": size}, [runs.identity(record)])
    if run.done:
        return run.done
    picks = picks.slice(0, count)
    parts = parquet_parts(source.below(GRADIENTS))
    rows = read_columns(parts, parts[0].columns).slice(0, count)
    write_table(run.out, "selection/selection.parquet", picks)
    write_table(run.out, f"{GRADIENTS}/part-00000.parquet", rows)
    log_det = picks["log_det"][-1].as_py()
    examples = source.read_text(EXAMPLES)
    if examples is not None:
        rows_of_all = [json.loads(line) for line in examples.split("\n") if line]
        whole = Counter(row["source"] for row in rows_of_all)
        facts = {
            **record.get("card", {}),
            "picked from": f"`{selection}`, {len(rows_of_all):,} examples, of which these are the first",
            "budget": f"`--size {size}`",
            "again": f"`raydpp cut {selection} --size {size} --out NEW`",
        }
        mix = {source: number / whole.total() for source, number in whole.most_common()}
        write_dataset(run.out, rows_of_all[:count], facts, log_det, mix, Distances.read(source))
    return run.finish(
        f"cut: the first {count:,} of {record['counts']['rows']:,} picks of {selection},"
        f" log det {log_det:,.2f} nats -> {run.out}",
        fingerprint=record["fingerprint"],
        corpus=record["corpus"],
        feature_column=record["feature_column"],
        learning_rate=record.get("learning_rate"),
        nested_unless=record["nested_unless"],
        card=record.get("card", {}),
        counts={"in": record["counts"]["rows"], "asked": count, "rows": count},
        log_det=log_det,
        stopped=None,
    )
