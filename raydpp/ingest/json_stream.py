"""Records out of a JSON document of any size, one after the other, with memory for one record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

MAX_RECORD = 2**26  # characters; a record beyond this is damage (a lost quote or bracket), not data
_CHUNK = 2**16
_SPACE = " \t\r\n"
_TURNS = frozenset({"messages", "conversations", "instances"})  # lists that belong to a row


class BrokenJson(ValueError):
    """The document cannot be read any further."""


def read_records(text: TextIO) -> Iterator[tuple[Any, bool]]:
    """The records (any JSON values) of a text decoded with `errors="surrogateescape"`, and whether each was UTF-8.

    A document is an array of records, an object with one list of objects, which are the records, or an object
    without one, which is itself a record (as is one whose list holds turns: messages, conversations,
    instances). Documents may follow one another.

    Raises:
        BrokenJson: The rest of the text is not JSON, or it is unclear what its records are.
    """
    stream = _Stream(text)
    while first := stream.peek():
        if first == "[":
            stream.take("[")
            yield from stream.elements()
        elif first == "{":
            yield from stream.members()
        else:
            raise BrokenJson(f"a record cannot begin with {first!r}")


class _Stream:
    """A window on a JSON text: `buffer[at:]` was fetched and is not parsed yet."""

    def __init__(self, text: TextIO) -> None:
        self.text, self.buffer, self.at = text, "", 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end of the text."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in _SPACE:
                    return self.buffer[self.at]
                self.at += 1
            if not self.fetch():
                return ""

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise BrokenJson(f"expected {character!r}, found {repr(found) if found else 'the end of the file'}")
        self.at += 1

    def value(self) -> tuple[Any, bool]:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except (ValueError, RecursionError) as error:  # broken, or not all of it was fetched yet
                fault = BrokenJson(getattr(error, "msg", str(error)))
                if len(self.buffer) - self.at > MAX_RECORD:
                    raise BrokenJson(f"{fault} (within {MAX_RECORD:,} characters)") from None
                if not self.fetch():
                    raise fault from None
                continue
            if end == len(self.buffer) and self.fetch():  # a number may go on in the next chunk
                continue
            intact = is_utf8(self.buffer[self.at : end])
            self.at = end
            return value, intact

    def elements(self) -> Iterator[tuple[Any, bool]]:
        """The values of an array whose bracket was taken."""
        if self.peek() == "]":
            return self.take("]")
        while True:
            yield self.value()
            if self.peek() == "]":
                return self.take("]")
            self.take(",")

    def members(self) -> Iterator[tuple[Any, bool]]:
        """The records of an object: those in its list of objects, or the object itself."""
        self.take("{")
        record, intact, rows = {}, True, None
        while self.peek() != "}":
            key, key_intact = self.value()
            if not isinstance(key, str):
                raise BrokenJson("a key of an object has to be text")
            self.take(":")
            intact &= key_intact
            if self.peek() == "[" and key not in _TURNS:
                self.take("[")
                if self.peek() == "{":
                    if rows is not None:
                        raise BrokenJson(f"the object has two lists of records, {rows!r} and {key!r}: keep one a file")
                    rows = key
                    yield from self.elements()
                else:
                    values = list(self.elements())
                    record[key] = [value for value, _ in values]
                    intact &= all(value_intact for _, value_intact in values)
            else:
                record[key], value_intact = self.value()
                intact &= value_intact
            if self.peek() != "}":
                self.take(",")
        self.take("}")
        if rows is None:
            yield record, intact

    def fetch(self) -> bool:
        """Read as much more as is in the buffer, so that a long record is parsed only a few times."""
        more = self.text.read(max(_CHUNK, len(self.buffer) - self.at))
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)


def is_utf8(text: str) -> bool:
    """Whether a text decoded with `errors="surrogateescape"` was UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
