"""The errors that a user can mend, apart from the project's own faults."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one sentence without a traceback, exit code 2.

    The message says what is wrong and what to do about it.
    """


class RowError(ValueError):
    """One row cannot be used; the message is the reason that goes to the rejects table, the job goes on."""


def checked_seed(name: str, seed: int) -> int:
    """A seed that every random generator takes; UserError for any other number."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} {seed}: a seed is a whole number from 0 to {2**32 - 1:,}")
    return seed


def few(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
