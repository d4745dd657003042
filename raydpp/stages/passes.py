"""Ray Data over the units of extract: until every conversation is in the table or in the rejects."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.corpus.sample import Sample
from raydpp.errors import UserError
from raydpp.stages.actors import COUNTS, FeatureActor, Work, tokenize_unit
from raydpp.stages.units import Done, Unit, look, plan_units

_LIGHT = 0.25  # CPUs: reading and tokenising beside the actors


def work_off(chosen: Sample, work: Work, done: Done, size: int, bar: Any) -> tuple[Done, dict[str, float]]:
    """Do what is not done yet.

    Args:
        chosen: The conversations that take part.
        work: What is done with them.
        done: What need not be done again.
        size: Conversations in one unit.
        bar: Progress, in conversations.

    Returns:
        What is done now, and what this session did of it: COUNTS and ``model_seconds``.

    Raises:
        UserError: The job cannot go on, in words.
        RuntimeError: Conversations are missing in the end.
    """
    session: dict[str, float] = dict.fromkeys((*COUNTS, "seconds"), 0)
    if units := plan_units(chosen, done, size, work.attempt):
        for report in _reports(units, work):
            if report["error"]:
                raise UserError(report["error"])
            bar.update(report["rows"] + report["rejects"])
            for name in session:
                session[name] += report[name]
        done = look(work.out)
    if len(done.ids) != chosen.rows:
        raise RuntimeError(f"{chosen.rows} conversations went in, but {len(done.ids)} came out: run it again")
    return done, {"model_seconds" if name == "seconds" else name: value for name, value in session.items()}


def _reports(units: list[Unit], work: Work) -> Iterator[dict[str, Any]]:
    """Do units on the cluster; what the actors report of each, as they finish."""
    import ray

    blocks = [
        pa.table({"name": [unit.name], "url": [unit.url], "rows": pa.array([unit.rows], pa.list_(pa.int64()))})
        for unit in units
    ]
    tokenised = ray.data.from_arrow(blocks).map_batches(
        functools.partial(_tokenise, work=work), batch_format="pyarrow", batch_size=None, num_cpus=_LIGHT
    )
    # Ray does a unit again, as often as it takes, whose actor or node is gone: what an example could do to its process
    # happens in a process apart, so that no unit can take one actor after the other with it.
    # The internal name, as the public one wants a batch size for GPUs: a batch is a unit, whatever its size.
    reports = tokenised.map_batches_internal(
        FeatureActor,
        fn_constructor_args=(work,),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=work.plan.least, max_size=work.plan.most),
        num_cpus=work.plan.cpus,
        num_gpus=work.plan.gpus,
    )
    yield from reports.iter_rows()


def _tokenise(table: pa.Table, work: Work) -> pa.Table:
    (row,) = table.to_pylist()
    return tokenize_unit(Unit(row["name"], row["url"], np.asarray(row["rows"], np.int64)), work)
