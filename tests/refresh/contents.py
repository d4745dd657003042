"""What lies in a folder, to look for what must not be there."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq


def texts(folder: Path) -> dict[str, str]:
    """What all files below a folder hold, Parquet as JSON, by name."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            is_table = path.suffix == ".parquet"
            text = json.dumps(pq.read_table(path).to_pylist()) if is_table else path.read_text(errors="replace")
            found[str(path.relative_to(folder))] = text
    return found
