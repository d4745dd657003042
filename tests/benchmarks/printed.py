"""What the benchmarks print: tables in Markdown, and what they ran on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

import raydpp


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table on standard output."""
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def machine(*packages: str) -> str:
    """The processor, torch's threads and the versions of raydpp and these packages, in a line."""
    versions = ", ".join([f"raydpp {raydpp.__version__}", *(f"{name} {version(name)}" for name in packages)])
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {versions}"
