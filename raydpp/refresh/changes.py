"""What a version of a selection changed beside the one before: a page, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from raydpp import runs
from raydpp.measure.stage import measure
from raydpp.refresh.versions import Versions
from raydpp.report.table import Table
from raydpp.tables import parquet_parts, read_columns


@dataclass(frozen=True)
class Changes:
    """What a version has and the version before has not, and the other way round.

    Attributes:
        version: Its name.
        before: That of the version before, of which what has left the corpus since is not counted any more.
        rows: Examples of the version.
        added: The ids that are new.
        removed: The ids that are gone.
        sources: By source, how many were picked before and are picked now.
        log_dets: By version, in nats.
        distances: The log-det distance by version, of as many examples of each, in nats per example.
        cost: What was done to get here, by name.
    """

    version: str
    before: str | None
    rows: int
    added: list[str]
    removed: list[str]
    sources: dict[str, tuple[int, int]]
    log_dets: dict[str, float]
    distances: dict[str, float]
    cost: Mapping[str, float]

    @property
    def tables(self) -> list[Table]:
        """What people read."""
        sources = [[source, *counts] for source, counts in self.sources.items()]
        total = [sum(counts[i] for counts in self.sources.values()) for i in (0, 1)]
        facts: list[list[object]] = [["examples added", len(self.added)], ["examples gone", len(self.removed)]]
        facts += [[f"log det of {name}, nats", value] for name, value in self.log_dets.items()]
        facts += [[f"log-det distance of {name}", value] for name, value in self.distances.items()]
        facts += [list(one) for one in self.cost.items()]
        return [
            Table("What changed", ["", "value"], facts),
            Table("Picks by source", ["source", "before", "now"], [*sources, ["all", *total]]),
        ]


def compare_versions(versions: Versions, cost: Mapping[str, float], address: str | None) -> Changes:
    """Compare the latest version with the one before; writes changes.json, report.html and diversity/ in OUT/changes.

    Distances are of the same number of examples of both, drawn at random.
    """
    *earlier, name = versions.names
    names = [*earlier[-1:], name]
    records = {one: runs.load_finished(["select"], versions.folder(one)) for one in names}
    made = {one: record["fingerprint"] for one, record in records.items()}
    picks = {one: _picks(versions, one) for one in names}
    old, new = picks[earlier[-1]] if earlier else {}, picks[name]
    then, now = Counter(old.values()), Counter(new.values())
    out = versions.changes(name)
    measured = measure(
        [versions.folder(one).url for one in names if runs.first_difference(made[one], made[name]) is None],
        out.url_of("diversity"),
        subset="uniform",
        measures=False,
        address=address,
    )
    changes = Changes(
        name,
        earlier[-1] if earlier else None,
        len(new),
        sorted(new.keys() - old.keys()),
        sorted(old.keys() - new.keys()),
        {source: (then[source], now[source]) for source in sorted(then.keys() | now.keys())},
        {one: record["log_det"] for one, record in records.items()},
        {one["table"]: one["mean"] for one in measured.record["results"]},
        cost,
    )
    out.write_json("changes.json", asdict(changes))
    from raydpp.report.html import Section, write_report

    lead = f"The selection is in {versions.folder(name)}, its report there; that of its diversity is beside this page."
    sections = [Section(table.title, table=table) for table in changes.tables]
    write_report(out, f"What version {name} changed", lead, sections)
    return changes


def _picks(versions: Versions, name: str) -> dict[str, str]:
    """The source of each pick, by id."""
    table = read_columns(parquet_parts(versions.folder(name).below("selection")), ["id", "source"])
    return dict(zip(table["id"].to_pylist(), table["source"].to_pylist(), strict=True))
