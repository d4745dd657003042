"""A stage's output folder: whole or visibly unfinished, and never another run's.

``run.json`` holds the configuration that replays the run (``raydpp STAGE --config OUT/run.json --out NEW``), versions,
counts and timings; ``_SUCCESS`` is written last. The same command again does nothing where it finished. Where it did
not, most stages begin again; one whose work is expensive resumes (``resume``). Where two starts of a command meet, the
folder belongs to the later one, whose token stands in run.json; the other ends when it next looks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from raydpp import __version__, metrics
from raydpp.errors import UserError
from raydpp.report.table import Table
from raydpp.storage import UNFINISHED, Folder, last_name

SUCCESS = "_SUCCESS"
RECORD = "run.json"
INTERRUPTED = "interrupted"
PREVIEW = "preview.html"
LEASE = "lease.json"
TO_COME = frozenset({PREVIEW, LEASE})
"""What may be in the folder of a run to come."""

EXECUTION = frozenset(
    {"out", "address", "actors", "gpus_per_actor", "batch_tokens", "rows_per_file", "prune", "partition_cache"}
)
"""Options that say where and how fast a stage runs, not what comes out of it."""

_DATA = (".parquet", ".jsonl")
"""The endings of files in the folders of a run that what comes next reads."""

_NEEDED = {
    "ingest": ("counts",),
    "extract": ("counts", "fingerprint", "corpus"),
    "select": ("counts", "fingerprint", "corpus"),
    "cut": ("counts", "fingerprint", "corpus"),
}
"""What other stages read of a record."""

_PACKAGES = ("ray", "torch", "transformers", "peft", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunResult:
    """What a stage left behind.

    Attributes:
        out: The output folder.
        record: What run.json holds.
        summary: One line for people.
        repeated: Whether an earlier run had already finished this, and nothing was done now.
    """

    out: str
    record: dict[str, Any]
    summary: str
    repeated: bool = False

    @property
    def tables(self) -> list[Table]:
        """What the stage found, to be shown to people."""
        return [Table(**table) for table in self.record.get("tables", ())]


@dataclass
class Run:
    """A stage at work on its output folder: ``begin`` it, write below ``out``, ``finish`` it."""

    out: Folder
    record: dict[str, Any]
    done: RunResult | None = None
    old: dict[str, Any] | None = None
    _started: float = field(default_factory=time.perf_counter)

    def finish(self, summary: str, **facts: Any) -> RunResult:
        """Write the record with these facts and the names of all data files, then the success marker."""
        require_owner(self.out, self.record["owner"])
        for name in self.out.files(UNFINISHED):  # of writers that were killed
            self.out.delete(name)
        self.record |= {
            "status": "finished",
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._started, 3),
            "summary": summary,
            "files": data_files(self.out),
            **facts,
        }
        self.out.write_json(RECORD, self.record)
        self.out.write_text(SUCCESS, "")
        return RunResult(self.out.url, self.record, summary)

    def claim(self, fingerprint: Mapping[str, Any]) -> str:
        """Take over a folder that ``resume`` began, once the fingerprint is known; returns the owner from now on.

        Whoever was at work on it before finds another owner in run.json, and must write no more (``require_owner``).
        UserError where what is there has another fingerprint.
        """
        before = (self.old or {}).get("fingerprint")
        self.record["fingerprint"] = json.loads(json.dumps(fingerprint))
        if before is not None and (difference := first_difference(before, self.record["fingerprint"])):
            name, old, new = difference
            raise _another_run(self.out, f"its {name} was {old!r} and now is {new!r}")
        self.out.write_json(RECORD, self.record)
        self.out.delete(SUCCESS)  # finished once, but its input has grown
        return str(self.record["owner"])

    def interrupt(self, summary: str, **facts: Any) -> RunResult:
        """Write the record of a run that Ctrl-C ended with a usable part of its output; it stays unfinished."""
        require_owner(self.out, self.record["owner"])
        self.record |= {"status": INTERRUPTED, "summary": summary, **facts}
        self.out.write_json(RECORD, self.record)
        return RunResult(self.out.url, self.record, summary)


def begin(stage: str, config: Mapping[str, Any], inputs: Sequence[Any], keep: bool = False) -> Run:
    """Claim the output folder for this run; ``done`` is set where the same configuration and inputs have finished.

    Args:
        stage: The stage's name.
        config: Every argument it was called with, ``out`` among them.
        inputs: What identifies the data it reads (strict JSON): the same values, the same data.
        keep: Whether what an unfinished run of the same configuration left is kept rather than cleared.

    Raises:
        UserError: The folder exists and is not this run's; the message names what differs.
    """
    out = Folder.at(str(config["out"]))
    metrics.label(stage, last_name(out.url))
    record = _new_record(stage, {**config, "out": out.url}, inputs)
    names = out.names()
    if names is None and Folder.holding(out.url)[0].has(last_name(out.url)):
        raise UserError(f"--out {out} is a file: name a folder")
    if names and not TO_COME.issuperset(names):
        old = _read_record(out)
        if old is None:
            raise _foreign(out)
        untouched = set(names) <= {RECORD, *TO_COME}  # a mistake was found before any work was done: nothing is lost
        if not untouched and (difference := _difference(old, record)):
            raise _another_run(out, difference)
        if SUCCESS in names and not lost(old, out):
            return Run(out, old, _repeated(out, old))
        for name in names if not keep else ():
            if name != RECORD:  # the new one takes its place: until then this stays the folder of this run
                out.delete(name)
    out.write_json(RECORD, record)
    return Run(out, record)


def resume(stage: str, config: Mapping[str, Any], inputs: Sequence[Any], free: Sequence[str] = ()) -> Run:
    """Like ``begin``, for a stage whose unfinished work is kept and whose input may grow; ``claim`` comes next.

    With other inputs than a finished run had, the stage must make sure itself that what is there belongs to them.
    ``free`` are options that say where the inputs are, and so may differ.
    """
    out = Folder.at(str(config["out"]))
    metrics.label(stage, last_name(out.url))
    names = out.names() or []
    old = _read_record(out) if names else None
    if old is None or names == [RECORD]:
        return begin(stage, config, inputs)
    record = _new_record(stage, {**config, "out": out.url}, inputs)
    here = {name: record["config"][name] for name in free}
    alike = {**old, "inputs": record["inputs"], "config": {**old["config"], **here}}
    if difference := _difference(alike, record):
        raise _another_run(out, difference)
    if old["inputs"] == record["inputs"] and SUCCESS in names and not lost(old, out):
        return Run(out, old, _repeated(out, old))
    return Run(out, record, old=old)


def refuse_foreign(out: Folder) -> None:
    """UserError where the folder holds something that is no run's."""
    if not TO_COME.issuperset(out.names() or ()) and _read_record(out) is None:
        raise _foreign(out)


def require_owner(out: Folder, owner: str) -> None:
    """UserError where another start has taken over the folder: this one must not write to it any more."""
    if (_read_record(out) or {}).get("owner") != owner:
        raise UserError(
            f"--out {out} was taken over by another start of the same command, which goes on; this one has ended"
        )


def lost(record: Mapping[str, Any], folder: Folder) -> str | None:
    """The URL of the first data file that a finished run does not have any more.

    UserError where there is one that the run did not write. What files hold is for those who read them to check, by
    the counts of rows: a column more does no harm.
    """
    recorded = record.get("files")
    if recorded is None:  # written before files were recorded
        return None
    found = set(data_files(folder))
    if foreign := sorted(found.difference(recorded)):
        raise UserError(
            f"{folder.url_of(foreign[0])} was not written by the raydpp {record['stage']} whose folder it is in: take"
            " it away"
        )
    missing = sorted(set(recorded) - found)
    return folder.url_of(missing[0]) if missing else None


def data_files(out: Folder) -> list[str]:
    """The data files in the folders of a run."""
    return [name for name in out.files() if "/" in name and name.endswith(_DATA)]


def _foreign(out: Folder) -> UserError:
    return UserError(f"--out {out} exists and is not a raydpp run: name another folder")


def _another_run(out: Folder, difference: str) -> UserError:
    return UserError(f"--out {out} holds another run: {difference}. Name another folder, or delete this one")


def _repeated(out: Folder, record: dict[str, Any]) -> RunResult:
    return RunResult(out.url, record, f"{record['summary']} (done before, nothing to do)", repeated=True)


def _new_record(stage: str, config: Mapping[str, Any], inputs: Sequence[Any]) -> dict[str, Any]:
    record = {
        "stage": stage,
        "status": "unfinished",
        "owner": f"{time.time_ns() // 10**6:011x}{uuid.uuid4().hex[:5]}",  # later ones are larger
        "config": dict(config),
        "inputs": list(inputs),
        "versions": {"python": platform.python_version(), "raydpp": __version__}
        | {name: version(name) for name in _PACKAGES},
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    found: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists, as they will be read back
    return found


def load_finished(stages: Sequence[str], folder: Folder, interrupted: bool = False) -> dict[str, Any]:
    """The record of a finished run of one of these stages; UserError where the folder is not one.

    With ``interrupted`` also of one that Ctrl-C ended with a usable part of its output.
    """
    wanted = f"give the output folder of raydpp {' or '.join(stages)}"
    names = folder.names()
    if names is None:
        raise UserError(f"there is no folder {folder}: {wanted}")
    record = _read_record(folder)
    if record is None:
        raise UserError(f"{folder} is not the output folder of a run (it has no {RECORD}): {wanted}")
    if record["stage"] not in stages:
        raise UserError(f"{folder} was written by raydpp {record['stage']}: {wanted}")
    if SUCCESS not in names and not (interrupted and record.get("status") == INTERRUPTED):
        raise UserError(
            f"{folder} is unfinished (it has no {SUCCESS}): run its raydpp {record['stage']} command again first"
        )
    if missing := [name for name in _NEEDED.get(record["stage"], ()) if name not in record]:
        raise UserError(
            f"{folder.url_of(RECORD)} lacks {missing[0]!r}, which raydpp {record['stage']} writes: restore the file, or"
            " run the command again with another --out"
        )
    if SUCCESS in names and (found := lost(record, folder)):
        raise UserError(
            f"{found} is missing: run the raydpp {record['stage']} command of {folder} again, to have it back"
        )
    return record


def check_rows(stage: str, folder: Folder, recorded: int, found: int) -> None:
    """UserError where the table of a finished run has another number of rows than its record says."""
    if found != recorded:
        raise UserError(
            f"{folder} has {found:,} rows, and its {RECORD} says {recorded:,}: a file of it was changed. Restore it, or"
            f" delete the folder and run its raydpp {stage} command again"
        )


def identity(record: Mapping[str, Any]) -> str:
    """A hash of what a finished run's output depends on (hex)."""
    text = json.dumps([record["stage"], _settings(record), record["inputs"], record.get("counts")], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["config"].items() if name not in EXECUTION}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    if old["stage"] != new["stage"]:
        return f"it was written by raydpp {old['stage']}"
    before, now = _settings(old), _settings(new)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"its {name} was {before.get(name)!r} and now is {now.get(name)!r}"
    return None if old["inputs"] == new["inputs"] else "its input files have changed since"


def _read_record(folder: Folder) -> dict[str, Any] | None:
    text = folder.read_text(RECORD)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"stage", "config", "inputs"} <= record.keys() else None


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two fingerprints differ, and its two values: ("projection seed", 0, 1)."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if inner := first_difference(old, new):
                return f"{name} {inner[0]}", *inner[1:]
        elif old != new:
            return name, old, new
    return None
