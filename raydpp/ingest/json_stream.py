"""Records out of a JSON document of any size, one after the other, with memory for one record."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO

MAX_RECORD = 2**26  # characters; a record beyond this is damage (a lost quote or bracket), not data
_CHUNK = 2**16
_SPACE = " \t\r\n"
_WHOLE = 2**22  # characters of an object that are read before it is decided what it is


class BrokenJson(ValueError):
    """The document cannot be read any further."""


def read_records(text: TextIO, is_row: Callable[[Collection[str]], bool]) -> Iterator[tuple[Any, bool]]:
    """The records (any JSON values) of a text decoded with `errors="surrogateescape"`, and whether each was UTF-8.

    A document is an array of records, or an object. An object whose keys are those of a row (``is_row``) is one record,
    whatever lists it holds; else its one list of objects holds the records; without such a list it is a record. Only
    an object of more than 4 Mi characters is decided upon by the keys that come before its first list of objects.
    Documents may follow one another.

    Raises:
        BrokenJson: The rest of the text is not JSON, or it is unclear what its records are.
    """
    stream = _Stream(text)
    while first := stream.peek():
        if first == "[":
            stream.take("[")
            yield from stream.elements()
        elif first == "{":
            yield from stream.document(is_row)
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

    def value(self, most: int | None = None) -> tuple[Any, bool]:
        """The next value. With ``most``, BrokenJson (and nothing taken) if that many characters do not hold it."""
        most = most or MAX_RECORD
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except (ValueError, RecursionError) as error:  # broken, or not all of it was fetched yet
                fault = BrokenJson(getattr(error, "msg", str(error)))
                if len(self.buffer) - self.at > most:
                    raise BrokenJson(f"{fault} (within {most:,} characters)") from None
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

    def document(self, is_row: Callable[[Collection[str]], bool]) -> Iterator[tuple[Any, bool]]:
        """The records of an object: itself, or those in its list of objects."""
        try:
            whole, intact = self.value(_WHOLE)
        except BrokenJson:  # too large, or damaged: what comes before the damage is read below
            yield from self.members(is_row)
            return
        lists = [key for key, held in whole.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        if not lists or is_row(whole):
            yield whole, intact
        elif len(lists) > 1:
            raise BrokenJson(_two_lists(*lists[:2]))
        else:
            yield from ((record, intact or _intact(record)) for record in whole[lists[0]])

    def members(self, is_row: Callable[[Collection[str]], bool]) -> Iterator[tuple[Any, bool]]:
        """The records of an object that is too large to be held."""
        self.take("{")
        record: dict[str, Any] = {}
        intact, rows = True, None
        while self.peek() != "}":
            key, key_intact = self.value()
            if not isinstance(key, str):
                raise BrokenJson("a key of an object has to be text")
            self.take(":")
            intact &= key_intact
            if self.peek() == "[" and not is_row({*record, key}):
                self.take("[")
                if self.peek() == "{":
                    if rows is not None:
                        raise BrokenJson(_two_lists(rows, key))
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


def _two_lists(one: str, other: str) -> str:
    return f"the object has two lists of records, {one!r} and {other!r}: keep one a file"


def _intact(record: Any) -> bool:
    return is_utf8(json.dumps(record, ensure_ascii=False))


def is_utf8(text: str) -> bool:
    """Whether a text decoded with `errors="surrogateescape"` was UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
