"""What an earlier selection from a growing table hands on: its scales, its picks, and which files are new since."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.select.inputs import Owned, SelectionJob
from raydpp.select.request import Picked, numbers
from raydpp.storage import Folder
from raydpp.tables import GradientTable, Part, open_table, same_fingerprint, vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """An earlier selection, and what its run.json says."""

    url: str
    record: Mapping[str, Any]

    @classmethod
    def at(cls, url: str, kernel: Kernel) -> Earlier:
        """Raises UserError where there is none, or one by another kernel."""
        found = cls(url, runs.load_finished(["select"], Folder.at(url)))
        if (other := found.record["config"]["kernel"]) != kernel.name:
            raise UserError(f"{url} was selected by the kernel {other}: give --kernel {other}")
        return found

    def scaled(self, objective: Objective, auto: bool) -> Objective:
        """The same by the gamma of that selection, where it is ``auto``, and by the unit that its quality had."""
        gamma = self.record["gamma"]
        if auto and gamma is not None:
            objective = replace(objective, kernel=replace(objective.kernel, gamma=gamma))
        return replace(objective, quality_unit=self.record["quality_unit"])

    def scores(self, judged: Sequence[Score]) -> tuple[Score, ...] | None:
        """The scores of that selection, with their centers and scales; None where it was judged by others."""
        scores = tuple(Score(**one) for one in self.record.get("quality", ()))
        if [(s.column, s.weight) for s in scores] == [(s.column, s.weight) for s in judged]:
            return scores
        log.info("select: %s was judged by other qualities: their scale is measured", self.url)
        return None

    def since(self, table: GradientTable) -> GradientTable:
        """The files that the table did not have then. Raises UserError where there are none."""
        parts = tuple(part for part in table.parts if part.name not in self.record["table_files"])
        if not parts:
            raise UserError(f"nothing has come to {table.name} since {self.url} was selected: there is nothing to add")
        return replace(table, parts=parts)

    def picks(self, whole: GradientTable, job: SelectionJob) -> Kept:
        """Those of its picks that are still in the table and not excluded, in their order, given what is owned."""
        tasks, given = job.tasks, job.given
        own = replace(open_table(self.url, whole.column), kind=whole.kind)
        same_fingerprint([whole, own])
        held = [name for name in own.parts[0].columns if name in whole.parts[0].columns]
        rows = own.read_columns(own.parts, [*held, *job.request.columns])
        here = {part.name: part.rows for part in whole.parts}
        if any(here.get(name) != count for name, count in self.record["table_files"].items()):
            rows = rows.filter(tasks.get(tasks.submit(_present, whole.parts, rows["id"])))
        rows = rows.filter(pc.invert(pc.is_in(rows["id"], given.excluded)))
        if lost := own.rows - len(rows):
            log.info("select: %d of the %d picks of %s are not in the table any more", lost, own.rows, self.url)
        features = vectors(rows[whole.column])  # (k, D)
        kernel = job.request.objective.kernel
        everything, gains = tasks.submit(_given_owned, given.features, features, kernel, returns=2)
        excluded = pa.concat_arrays([given.excluded, rows["id"].combine_chunks()])
        owned = replace(given, features=everything, count=given.count + len(rows), excluded=excluded)
        return Kept(rows, tasks.get(gains), owned)


@dataclass(frozen=True)
class Kept:
    """The k picks of an earlier selection that stay, their log gains, (k,) nats, and what is owned with them."""

    rows: pa.Table
    log_gains: Sequence[float]
    owned: Owned

    def search(self, job: SelectionJob, beside: bool = False) -> SelectionJob | None:
        """The job given these picks, with what they leave of its budget, or ``beside`` them with all of it; None where
        nothing is left."""
        if beside:
            return replace(job, given=self.owned)
        budget, k = job.request.budget, len(self.rows)
        counts = Counter(self.rows["source"].to_pylist()) if "source" in self.rows.column_names else Counter[str]()
        minimum, maximum = (
            {source: max(0, count - counts[source]) for source, count in quotas.items()}
            for quotas in (budget.minimum, budget.maximum)
        )
        size = None if budget.size is None else max(0, int(budget.size) - k)
        tokens = None
        if budget.tokens is not None:
            tokens = budget.tokens - float(numbers(self.rows, job.request.cost).sum())
        if size == 0 or (tokens is not None and tokens <= 0):
            return None
        request = replace(
            job.request, budget=replace(budget, size=size, tokens=tokens, minimum=minimum, maximum=maximum)
        )
        return replace(job, request=request, given=self.owned)

    def joined(self, picked: Picked | None) -> Picked:
        """These picks, then those of a search."""
        rows, gains, stopped, oracle = self.rows, list(self.log_gains), None, ""
        if picked is not None:
            rows = pa.concat_tables([rows, picked.rows.select(rows.column_names)], promote_options="permissive")
            gains += picked.selection.log_gains.tolist()
            stopped, oracle = picked.selection.stopped, picked.selection.oracle
        found = Selection.of(range(len(rows)), gains, stopped, oracle)
        return replace(picked, rows=rows, selection=found) if picked else Picked(rows, found)


def _present(parts: Sequence[Part], ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which of some ids a table has, a file in memory at a time."""
    found = pa.chunked_array([np.zeros(len(ids), bool)])
    for part in parts:
        found = pc.or_(found, pc.is_in(ids, part.read(["id"])["id"].combine_chunks()))
    return found


def _given_owned(owned: np.ndarray | None, kept: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, list[float]]:
    """(O + k, D) features of what is owned and of what is kept, and the (k,) log gains of the latter in their order."""
    from raydpp.dpp.features import UnitRows
    from raydpp.dpp.log_det import ordered_log_gains

    everything = kept if owned is None else np.concatenate([owned, kept.astype(owned.dtype)])
    before = len(everything) - len(kept)
    if not len(kept):
        return everything, []
    return everything, ordered_log_gains(UnitRows(everything), range(before, len(everything)), kernel, range(before))
