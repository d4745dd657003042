"""Where a chat template puts what the assistant wrote.

A conversation is rendered twice: as it is, and with a stand-in for every text of the assistant. The stand-ins show
where the template puts those texts, whatever their words are. Putting the texts back must give the first rendering,
letter by letter: a row for which it does not is refused. So white space that a template trims, thinking that it drops
and text that it adds are all accounted for, and nothing is ever searched for by its words.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from raydpp.errors import RowError

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""What a base model without a chat template gets: "User: ...", blank line, "Assistant: ..." and the end token; before
them the token that begins a text, where its tokenizer adds one by itself."""

Messages = Sequence[Mapping[str, Any]]
"""The turns of a conversation, each with its role and content. An assistant's may have reasoning_content, its thinking
before the answer, and weight, 0 where the turn is context and no response. None is the same as missing."""

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""

_THINK = r"</?think>|\[/?THINK\]"  # templates look for these in a turn's text, so that no stand-in may hide them
_THINK_AND_SPACE = re.compile(rf"(?:\s|{_THINK})*")
_THINK_BEFORE = re.compile(rf"(?:(?:{_THINK})\s*)+$")
_THINK_AFTER = re.compile(rf"(?:\s*(?:{_THINK}))+")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# For templates that write the date: the same row gives the same point on every day.
_STOPPED_CLOCK = (
    "{% macro strftime_now(pattern) %}{{ pattern | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}"
)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an assistant turn that one stand-in takes the place of: text without thinking marks.

    Attributes:
        turn: The number of the turn.
        text: Its words, without the white space ``before`` and ``after`` them.
        opened: How many thinking marks of the turn come right before it; ``closed``, right after it.
    """

    turn: int
    text: str
    before: str
    after: str
    opened: int
    closed: int


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A rendered conversation: what the template wrote around the parts that it shows, one literal more than parts."""

    parts: list[int]
    literals: list[str]


def template_of(tokenizer: Any) -> str:
    """The chat template in use: the tokenizer's own, else DEFAULT_TEMPLATE."""
    own = tokenizer.chat_template
    if own:
        return own if isinstance(own, str) else tokenizer.get_chat_template()
    return "{{ bos_token }}" * _begins_texts(tokenizer) + DEFAULT_TEMPLATE


def with_reasoning(message: Mapping[str, Any]) -> str:
    """A turn's content, its reasoning in front of it as most models write it."""
    reasoning = message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n{message['content']}" if reasoning else message["content"]


def is_response(message: Mapping[str, Any]) -> bool:
    """Whether a turn is the assistant's and not marked as context."""
    return message["role"] == "assistant" and message.get("weight") != 0


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        marks_generation: Whether the template itself says which text is generated.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = _STOPPED_CLOCK * ("strftime_now" in source) + source
        self.marks_generation = bool(_GENERATION.search(source))
        self._added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""}
        self._reasoning_key = next(filter(self._shows, _REASONING_KEYS), None)
        self._opening = self._opening_mark()

    @staticmethod
    def of(tokenizer: Any) -> ChatTemplate:
        return _cached(tokenizer, template_of(tokenizer))

    def apply(self, turns: list[dict[str, str]], **options: Any) -> Any:
        """What transformers makes of prepared turns. Raises RowError where the template refuses them."""
        try:
            return self._tokenizer.apply_chat_template(turns, chat_template=self._source, **options)
        except Exception as error:  # templates raise their own errors, in jinja2's classes, for roles they do not know
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def render(self, turns: list[dict[str, str]], **options: Any) -> str:
        return str(self.apply(turns, tokenize=False, **options))

    def prepare(self, messages: Messages) -> list[dict[str, str]]:
        """The turns as the template takes them; reasoning that it has no key for goes to the content."""
        turns = []
        for message in messages:
            turn = {"role": message["role"], "content": message["content"]}
            if self._reasoning_key and message.get("reasoning_content"):
                turn[self._reasoning_key] = message["reasoning_content"]
            else:
                turn["content"] = with_reasoning(message)
            turns.append(turn)
        return turns

    def locate(self, turns: list[dict[str, str]], wanted: set[int], end_of_turn: bool) -> tuple[str, list[Span]]:
        """The rendering of all turns, and where the words of the wanted assistant turns stand in it.

        A turn's thinking counts with its marks, but for one that the template ends a generation prompt with.

        Args:
            turns: Prepared turns.
            wanted: Numbers of assistant turns. One without words has no span.
            end_of_turn: Whether what the template writes to end a turn belongs to its span.

        Raises:
            RowError: The template refuses the turns, or changes what the assistant wrote.
        """
        text = self.render(turns)
        stem = _absent_from([text, *(value for turn in turns for value in turn.values())])
        masked, parts = self._with_stand_ins(turns, stem)
        found = _read(self.render(masked), stem)
        if len(set(found.parts)) < len(found.parts):
            raise RowError("the chat template shows what the assistant wrote more than once")
        # Every literal is followed by the part that belongs there; where each part starts is known on the way.
        starts, filled = [], found.literals[0]
        for number, literal in zip(found.parts, found.literals[1:], strict=True):
            starts.append(len(filled))
            filled += parts[number].text + literal
        if filled != text:
            raise RowError("the chat template changes what the assistant wrote, so that its tokens cannot be located")
        own = self._own_white_space(masked, parts, found, stem)
        end_mark = self._end_mark(masked, parts, found, stem) if end_of_turn else ""
        spans: list[Span] = []
        for turn in sorted(wanted):
            shown = [n for n, number in enumerate(found.parts) if parts[number].turn == turn]
            if not shown:
                continue
            first, last = shown[0], shown[-1]
            begins = [starts[n] for n in shown]
            ends = [starts[n] + len(parts[found.parts[n]].text) for n in shown]
            after = found.literals[last + 1]
            opened, closed = parts[found.parts[first]].opened, parts[found.parts[last]].closed
            begins[0] -= self._thinking_before(found.literals[first], opened) or own[first][0]
            length = _thinking_after(after, closed) or own[last][1]
            ends[-1] += length
            spans += _joined(begins, ends, text)
            space = _leading_space(after[length:])
            if end_mark and after.startswith(end_mark, length + space):
                spans.append((ends[-1] + space, ends[-1] + space + len(end_mark)))
        return text, spans

    def _shows(self, key: str) -> bool:
        answer = {"role": "assistant", "content": "Yes.", key: "shown?"}
        try:
            return "shown?" in self.render([{"role": "user", "content": "Is it?"}, answer])
        except RowError:
            return False

    def _opening_mark(self) -> str:
        """The thinking mark that ends a generation prompt: a turn that starts with it has not written it."""
        try:
            prompt = self.render([{"role": "user", "content": "Is it?"}], add_generation_prompt=True)
        except RowError:
            return ""
        marks = re.search(rf"({_THINK})\s*$", prompt)
        return marks.group(1) if marks else ""

    def _with_stand_ins(self, turns: list[dict[str, str]], stem: str) -> tuple[list[dict[str, str]], list[_Part]]:
        masked: list[dict[str, str]] = []
        parts: list[_Part] = []
        for number, turn in enumerate(turns):
            masked.append(dict(turn))
            if turn["role"] != "assistant":
                continue
            for key in (self._reasoning_key, "content"):
                if key in turn:
                    pieces = re.split(f"({_THINK})", turn[key])  # text and marks by turns, text at both ends
                    for n in range(0, len(pieces), 2):
                        if words := pieces[n].strip():
                            before, after = pieces[n].split(words)
                            pieces[n] = f"{before}{stem}{len(parts)}q{after}"
                            apart = key == self._reasoning_key  # then the template writes a mark at either end
                            opened = _marks(pieces[:n][::-1], apart)
                            closed = _marks(pieces[n + 1 :], apart)
                            parts.append(_Part(number, words, before, after, opened, closed))
                    masked[-1][key] = "".join(pieces)
        return masked, parts

    def _thinking_before(self, literal: str, most: int) -> int:
        """The length of the last marks of thinking that a literal ends with, without one that belongs to the prompt."""
        run = _THINK_BEFORE.search(literal)
        marks = [mark.start() for mark in re.finditer(_THINK, literal[run.start() :])] if run else []
        if run and self._opening and run.group().startswith(self._opening):
            del marks[0]
        return len(run.group()) - marks[-most:][0] if run and most and marks else 0

    def _own_white_space(
        self, masked: list[dict[str, str]], parts: list[_Part], found: _Rendering, stem: str
    ) -> list[tuple[int, int]]:
        """Of every shown part, how much of its turn's own white space the template has kept before and after it.

        White space beside a part may be the template's as well: what is there without the turn's own tells.
        """
        nothing = [(0, 0)] * len(found.parts)
        if not any(part.before or part.after for part in parts):
            return nothing
        around = re.compile(rf"\s*({_THINK}|{stem}\d+q)\s*")
        bare = [
            {key: around.sub(r"\1", text) if turn["role"] == "assistant" else text for key, text in turn.items()}
            for turn in masked
        ]
        try:
            without = _read(self.render(bare), stem)
        except RowError:
            return nothing
        if without.parts != found.parts:
            return nothing
        own = []
        for number, (left, right), (bare_left, bare_right) in zip(
            found.parts, pairwise(found.literals), pairwise(without.literals), strict=True
        ):
            kept_before = len(left) - len(left.rstrip()) - len(bare_left) + len(bare_left.rstrip())
            kept_after = _leading_space(right) - _leading_space(bare_right)
            before, after = len(parts[number].before), len(parts[number].after)
            own.append((min(max(kept_before, 0), before), min(max(kept_after, 0), after)))
        return own

    def _end_mark(self, masked: list[dict[str, str]], parts: list[_Part], found: _Rendering, stem: str) -> str:
        """What the template writes to end an assistant turn: it stands behind the last one where nothing follows."""
        if not found.parts:
            return ""
        last = parts[found.parts[-1]]
        if last.turn < len(masked) - 1:
            try:
                found = _read(self.render(masked[: last.turn + 1]), stem)
            except RowError:
                return ""
        tail = found.literals[-1]
        tail = tail[_thinking_after(tail, last.closed) :].strip()
        token = max(filter(tail.startswith, self._added), key=len, default="")
        return token or (tail if len(tail.split()) == 1 else "")


@functools.lru_cache(maxsize=8)
def _begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a token before every text, as that of a base model that was trained so does."""
    alone, added = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return tokenizer.bos_token_id is not None and added[: len(added) - len(alone)][:1] == [tokenizer.bos_token_id]


@functools.lru_cache(maxsize=8)
def _cached(tokenizer: Any, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, source)


def _absent_from(texts: list[str]) -> str:
    """A word that no text holds, and that cannot overlap itself."""
    stem = "standin"
    while any(stem in text for text in texts):
        stem = stem.replace("i", "ii", 1)
    return stem


def _read(text: str, stem: str) -> _Rendering:
    pieces = re.split(rf"{stem}(\d+)q", text)
    return _Rendering([int(number) for number in pieces[1::2]], pieces[::2])


def _joined(begins: list[int], ends: list[int], text: str) -> Iterator[Span]:
    """The parts of one turn, with what lies between two of them where that is thinking marks and white space only."""
    start = begins[0]
    for end, following in zip(ends, begins[1:], strict=False):
        if not _THINK_AND_SPACE.fullmatch(text, end, following):
            yield start, end
            start = following
    yield start, ends[-1]


def _marks(pieces: list[str], more: bool) -> int:
    """How many marks of thinking come first in pieces of a text, every other one a mark; one more at its end or not."""
    words = next((n for n, text in enumerate(pieces[1::2]) if text.strip()), None)
    return len(pieces[::2]) + more if words is None else words + 1


def _thinking_after(literal: str, most: int) -> int:
    """The length of the first marks of thinking that a literal starts with."""
    run = _THINK_AFTER.match(literal)
    marks = [mark.end() for mark in re.finditer(_THINK, run.group())] if run else []
    return marks[:most][-1] if most and marks else 0


def _leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())
