"""The schemas instruction data is published in, and how a row of each becomes conversations.

Sources: OpenAI's chat messages, ShareGPT and LLaMA-Factory's forms of it with tools and history, TRL's conversational
prompts, preferences and KTO rows, Alpaca (Taori et al. 2023), Dolly (Conover et al. 2023), Self-Instruct (Wang et al.
2023). Whether a conversation can be trained on is for `raydpp.ingest.conversation.validated` to say.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import ROLES, Message

Row = dict[str, Any]
Preferred = Literal["chosen", "rejected"]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "response", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
_SPEAKER, _CONTENT = ("role", "from"), ("content", "value", "text")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WEIGHT = ("weight", "train", "training", "loss")  # OpenAI's and axolotl's keys for a turn that is context only
_CALLS = ("tool_calls", "function_call")
_TURN_KEYS = frozenset((*_SPEAKER, *_CONTENT, *_REASONING, *_WEIGHT, *_CALLS))
_PASSAGES = ("context", "contexts", "passage", "passages")


@dataclass(frozen=True)
class Schema:
    """How the rows of a file are read.

    ``read`` takes a row and returns its conversations: one, but for self-instruct one per instance. Keys of a turn that
    nothing is made of are in its ``rest``. It raises RowError with the column's name where a value is missing or of the
    wrong type.
    """

    name: str
    columns: tuple[str, ...]  # that a row must have
    read: Callable[..., list[list[Message]]]
    companions: tuple[str, ...] = ()  # columns that are read too, where a row has them


@dataclass(frozen=True)
class ColumnNames:
    """Columns the user names: `messages`, or `prompt` and `response`; `system` goes with any schema.

    Of preferences, `take` says which answer is read. `roles` are names of speakers, in lower case, and their roles.
    """

    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None
    take: Preferred | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reader:
    """What all ways to read a row share: the column of system prompts, and names of roles."""

    system: str = "system"
    roles: Mapping[str, str] = field(default_factory=dict)

    def turns(self, row: Row, column: str) -> list[list[Message]]:
        """A column of turns: {role, content} or {from, value}, a struct of their lists, or either as JSON."""
        return [self._assembled(row, self._turn_list(row.get(column), row, column))]

    def pair(
        self, row: Row, prompt: str, response: str, contexts: tuple[str, ...] = _PASSAGES, label: bool = False
    ) -> list[list[Message]]:
        """A prompt, its context and earlier turns, and the response: texts or lists of turns, each from its column."""
        if label and _is_false(row.get("label")):
            raise RowError("the column 'label' is false: the response is marked as a bad one (KTO)")
        asked, answered = row.get(prompt), row.get(response)
        if _are_turns(asked) or _are_turns(answered):
            before = self._said(row, prompt, "user")
            return [self._assembled(row, [*_as_context(before), *self._said(row, response, "assistant")])]
        question = _joined(_text(row, prompt), *(_passages(row, context) for context in contexts))
        answer: Message = {"role": "assistant", "content": _text(row, response)}
        if reasoning := next(filter(None, (_optional(row, key) for key in _REASONING[:2])), ""):
            answer["reasoning_content"] = reasoning
        asks: Message = {"role": "user", "content": question}
        return [_with_system(_optional(row, self.system), [*self._history(row), asks, answer])]

    def instances(self, row: Row) -> list[list[Message]]:
        """A self-instruct seed task: one conversation per instance."""
        instruction, instances = _text(row, "instruction"), _parsed(row.get("instances"))
        if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
            raise _wrong(row, "instances", "a list of inputs and outputs")
        preface = _optional(row, self.system)
        return [
            _with_system(preface, _pair(_joined(instruction, _optional(item, "input")), _text(item, "output")))
            for item in instances
        ]

    def preference(self, row: Row, take: Preferred) -> list[list[Message]]:
        """One of two answers, a text, a turn or turns; with the prompt in it, or in a column of its own."""
        answer = self._said(row, take, "assistant")
        if not any(turn["role"] == "user" for turn in answer):
            prompt = next((name for name in _PROMPTS if not is_missing(row.get(name))), "prompt")
            answer = [*_as_context(self._said(row, prompt, "user")), *answer]
        return [self._assembled(row, answer)]

    def _said(self, row: Row, column: str, role: str) -> list[Message]:
        value = row.get(column)
        if isinstance(value, dict):
            return [self._turn(value, column)]
        if _are_turns(value):
            return self._turn_list(value, row, column)
        return [{"role": role, "content": _text(row, column)}]

    def _turn_list(self, value: Any, row: Row, column: str) -> list[Message]:
        turns = _parsed(value)
        if isinstance(turns, dict):  # a struct of lists, as Sequence({...}) of datasets is stored
            lists = {key: items for key, items in turns.items() if isinstance(items, list)}
            if len({len(items) for items in lists.values()}) > 1:
                raise RowError(f"the column {column!r} has lists of different lengths")
            turns = [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
        if not isinstance(turns, list):
            raise _wrong(row, column, "a list of turns")
        return [self._turn(turn, column) for turn in turns]

    def _turn(self, turn: Any, column: str) -> Message:
        if not isinstance(turn, dict):
            raise RowError(f"the column {column!r} has a turn that is {_kind(turn)}, not an object")
        speaker, content = _first(turn, _SPEAKER), _first(turn, _CONTENT)
        name = speaker.strip().lower() if isinstance(speaker, str) else None
        role = self.roles.get(name) or _ROLES.get(name) if name else None
        if role is None:
            raise RowError(f"the column {column!r} has a turn of the unknown role {speaker!r} (--role NAME=ROLE)")
        message: Message = {"role": role}
        if role == "assistant":
            calls, reasoning = _first(turn, _CALLS), _first(turn, _REASONING)
            if any(_is_false(turn.get(key)) for key in _WEIGHT):
                message["weight"] = 0
            if isinstance(reasoning, str) and reasoning.strip():
                message["reasoning_content"] = reasoning
            if content is None and (calls or "reasoning_content" in message):
                content = ""
        else:
            calls = None
        if isinstance(content, list):
            content = "".join(_part(part, column) for part in content)
        if not isinstance(content, str):
            raise RowError(f"the column {column!r} has a turn whose content is {_kind(content)}, not text")
        message["content"] = _joined(content, _json(calls, column)) if calls else content
        rest = {key: value for key, value in turn.items() if key not in _TURN_KEYS and not is_missing(value)}
        return {**message, "rest": rest} if rest else message

    def _history(self, row: Row) -> list[Message]:
        """Alpaca's earlier turns: pairs of a prompt and a response, or turns."""
        history = _parsed(row.get("history"))
        if is_missing(history) or history in ("", []):
            return []
        if not isinstance(history, list):
            raise _wrong(row, "history", "a list of earlier turns")
        if all(isinstance(turn, dict) for turn in history):
            return self._turn_list(history, row, "history")
        texts = [text for pair in history for text in (pair if isinstance(pair, (list, tuple)) else (None,))]
        if not all(isinstance(text, str) for text in texts) or any(len(pair) != 2 for pair in history):
            raise RowError("the column 'history' has a turn that is not a pair of texts")
        return [message for pair in history for message in _pair(*pair)]

    def _assembled(self, row: Row, messages: list[Message]) -> list[Message]:
        """The conversation with one system turn: the system column, its own and the tools, each verbatim and once."""
        first = messages.pop(0) if messages and messages[0]["role"] == "system" else None
        column, own = _optional(row, self.system), first["content"] if first else ""
        system = own if column == own else _joined(column, own)
        found = _with_system(with_tools(system, tools_of(row)), messages)
        return [{**found[0], "rest": first["rest"]}, *found[1:]] if first and "rest" in first and found else found


def tools_of(row: Row) -> str:
    """The tools of a row as they are shown to a model: its column as text or as JSON, empty where there are none."""
    tools = row.get("tools")
    if is_missing(tools):
        return ""
    text = tools if isinstance(tools, str) else _json(tools, "tools")
    return "" if text.strip() in ("", "[]", "{}", "null") else text


def with_tools(system: str, tools: str) -> str:
    """A system prompt with the tools at its end, unless it shows them already."""
    return system if "".join(tools.split()) in "".join(system.split()) else _joined(system, tools)


def without_tools(messages: list[Message], tools: str) -> list[Message]:
    """The conversation as it was before ``with_tools`` added these to its system prompt."""
    if not tools or not messages or messages[0]["role"] != "system" or not messages[0]["content"].endswith(tools):
        return messages
    system = messages[0]["content"].removesuffix(tools).removesuffix("\n\n")
    return [{**messages[0], "content": system}, *messages[1:]] if system else messages[1:]


_PROMPTS = ("prompt", "conversations", "question", "instruction")
_PAIR_COMPANIONS = (*_PASSAGES, "history", *_REASONING[:2])


def _pairs(name: str, *columns: str, contexts: tuple[str, ...] = _PASSAGES, label: bool = False) -> Schema:
    read = partial(_Reader.pair, prompt=columns[0], response=columns[-1], contexts=contexts, label=label)
    return Schema(name, columns, read, (*contexts, *_PAIR_COMPANIONS))


_WITH_INPUT = ("input", *_PASSAGES)
# The more specific first. What reads a row takes a _Reader first: _for_user binds the user's.
_SCHEMAS = (
    Schema("messages", ("messages",), partial(_Reader.turns, column="messages")),
    Schema("sharegpt", ("conversations",), partial(_Reader.turns, column="conversations")),
    Schema("self-instruct", ("instruction", "instances"), _Reader.instances),
    _pairs("alpaca", "instruction", "output", contexts=_WITH_INPUT),
    _pairs("dolly", "instruction", "context", "response", contexts=_WITH_INPUT),
    _pairs("instruction/response", "instruction", "response", contexts=_WITH_INPUT),
    _pairs("prompt/completion", "prompt", "completion", label=True),
    _pairs("question/answer", "question", "answer"),
)


def _for_user(schema: Schema, names: ColumnNames) -> Schema:
    system = names.system or "system"
    columns = (*schema.columns, names.system) if names.system else schema.columns
    read = partial(schema.read, _Reader(system, names.roles))
    return Schema(schema.name, columns, read, (*schema.companions, system))


SCHEMAS = tuple(_for_user(schema, ColumnNames()) for schema in _SCHEMAS)
"""What is detected, the more specific schemas first."""


def detect_schemas(columns: Collection[str], names: ColumnNames | None = None) -> tuple[Schema, ...]:
    """The schemas whose columns are all among these: the named columns' own alone, else those of `SCHEMAS`.

    Raises:
        UserError: No schema fits, a named column is not there, or the names contradict each other.
    """
    names = names or ColumnNames()
    seen = ", ".join(sorted(columns)) or "none"
    for option in ("prompt", "response", "system", "messages"):
        name = getattr(names, option)
        if name is not None and name not in columns:
            raise UserError(
                f"--{option}-column names {name!r}, but the columns are: {seen}. For some of the files only, write"
                f" --{option}-column 'GLOB={name}'."
            )
    if (names.prompt is None) != (names.response is None):
        raise UserError("--prompt-column and --response-column go together: give both, or neither.")
    if names.messages is not None and names.prompt is not None:
        raise UserError("Give either --messages-column, or --prompt-column and --response-column, not both.")

    found: list[Schema]
    if names.messages is not None:
        found = [Schema("named columns", (names.messages,), partial(_Reader.turns, column=names.messages))]
    elif names.prompt is not None and names.response is not None:
        found = [_pairs("named columns", names.prompt, names.response)]
    else:
        found = [schema for schema in _SCHEMAS if set(schema.columns) <= set(columns)]
        if names.take and names.take in columns:
            read = partial(_Reader.preference, take=names.take)
            found = [Schema(f"preference ({names.take})", (names.take,), read, _PROMPTS), *found]
    if not found:
        known = "; ".join(f"{schema.name} ({', '.join(schema.columns)})" for schema in _SCHEMAS)
        hint = " Of preferences, --take chosen reads the preferred answer." if "chosen" in columns else ""
        raise UserError(
            f"No known schema has these columns: {seen}. Known schemas and their columns: {known}.{hint} "
            "Name the columns with --messages-column, or with --prompt-column and --response-column "
            "(and --system-column)."
        )
    return tuple(_for_user(schema, names) for schema in found)


def schema_of(row: Row, schemas: Sequence[Schema]) -> Schema:
    """The schema among those of a file that a row is read by: the first whose columns have values, else are there."""

    def first(has: Callable[[str], bool]) -> Schema | None:
        return next((schema for schema in schemas if all(map(has, schema.columns))), None)

    filled = first(lambda name: not is_missing(row.get(name)) and row[name] != "")
    return filled or first(lambda name: not is_missing(row.get(name))) or first(row.__contains__) or schemas[0]


def is_row(columns: Collection[str], names: ColumnNames | None = None) -> bool:
    """Whether an object with these keys is a row of some schema, rather than something that holds rows."""
    try:
        return bool(detect_schemas(columns, names))
    except UserError:
        return False


def checked_roles(options: Sequence[str]) -> dict[str, str]:
    """The names of speakers, in lower case, and their roles, from options such as Patient=user."""
    found = {}
    for option in options:
        name, _, role = option.rpartition("=")
        if not name or role not in ROLES:
            raise UserError(f"--role {option}: write NAME=ROLE, where ROLE is one of {', '.join(ROLES)}")
        found[name.strip().lower()] = role
    return found


def _as_context(prompt: list[Message]) -> list[Message]:
    """The turns of a prompt: trained on is what follows them, not an assistant's turns in between."""
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]


def _first(turn: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first of several keys' values that is there: Parquet gives a turn the keys of all turns."""
    return next((turn[key] for key in keys if not is_missing(turn.get(key))), None)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _parsed(value: Any) -> Any:
    """A list or object that a column of text holds, as JSON or as Python prints it; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_false(value: Any) -> bool:
    return (isinstance(value, (bool, int, float)) and value == 0) or (
        isinstance(value, str) and value.strip().lower() in ("false", "0", "0.0")
    )


def _part(part: Any, column: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise RowError(f"the column {column!r} has a turn with a part that is not text ({kind})")


def _pair(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text.strip())


def _passages(row: Row, column: str) -> str:
    """A text, or several."""
    value = row.get(column)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return _joined(*value)
    return _optional(row, column)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _wrong(row, column, "text")
    return value


def _optional(row: Row, column: str) -> str:
    return "" if is_missing(row.get(column)) else _text(row, column)


def _wrong(row: Row, column: str, wanted: str) -> RowError:
    if column not in row:
        return RowError(f"the column {column!r} is missing")
    value = row[column]
    found = "an empty list" if value == [] else _kind(value)
    return RowError(f"the column {column!r} is {found}, not {wanted}")


def _kind(value: Any) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object"}
    return "null" if is_missing(value) else kinds.get(type(value), type(value).__name__)


def _json(value: Any, column: str) -> str:
    try:
        return json.dumps(_without_nulls(value), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"the column {column!r} holds what JSON cannot write") from None


def _without_nulls(value: Any) -> Any:
    """Parquet fills the keys that other rows have with nulls: without them a row reads the same from JSON."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
