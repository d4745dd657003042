"""The schemas instruction data is published in, and how a row of each becomes conversations.

Sources: OpenAI's chat messages, ShareGPT and LLaMA-Factory's form of it with tools, Alpaca (Taori et al. 2023), Dolly
(Conover et al. 2023), Self-Instruct (Wang et al. 2023). Whether a conversation can be trained on is for
`raydpp.ingest.conversation.validated` to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import Message

Row = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


@dataclass(frozen=True)
class Schema:
    """How the rows of a file are read.

    ``read`` takes a row and returns its conversations: one, but for self-instruct one per instance. It raises RowError
    with the column's name where a value is missing or of the wrong type.
    """

    name: str
    columns: tuple[str, ...]  # that a file must have
    read: Callable[..., list[list[Message]]]


@dataclass(frozen=True)
class ColumnNames:
    """Columns the user names: `messages`, or `prompt` and `response`; `system` goes with any schema."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None


def read_turns(row: Row, column: str, system: str = "system") -> list[list[Message]]:
    """Read a column of turns, {role, content} or {from, value}, with the optional columns system and tools.

    The system turn is the system column, the conversation's own system turn and the tools, each verbatim,
    joined by a blank line. Tool calls of an assistant turn follow its content as JSON.
    """
    turns = row.get(column)
    if not isinstance(turns, list):
        raise _wrong(row, column, "a list of turns")
    messages = [_turn(turn, column) for turn in turns]
    own = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    tools = row.get("tools") or ""
    if not isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools.strip() == "[]":
        tools = ""
    return [_with_system(_joined(_optional(row, system), own, tools), messages)]


def read_pair(
    row: Row, prompt: str, response: str, context: str | None = None, system: str = "system"
) -> list[list[Message]]:
    """Read a prompt and its response, each from its column; an optional context follows the prompt."""
    question = _joined(_text(row, prompt), _optional(row, context) if context else "")
    return [_with_system(_optional(row, system), _pair(question, _text(row, response)))]


def read_instances(row: Row, system: str = "system") -> list[list[Message]]:
    """Read a self-instruct seed task: one conversation per instance."""
    instruction, instances = _text(row, "instruction"), row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise _wrong(row, "instances", "a list of inputs and outputs")
    preface = _optional(row, system)
    return [
        _with_system(preface, _pair(_joined(instruction, _optional(item, "input")), _text(item, "output")))
        for item in instances
    ]


def _pairs(prompt: str, response: str, context: str | None = None) -> Callable[..., list[list[Message]]]:
    return partial(read_pair, prompt=prompt, response=response, context=context)


SCHEMAS = (  # the more specific first: the first whose columns are all there is taken
    Schema("messages", ("messages",), partial(read_turns, column="messages")),
    Schema("sharegpt", ("conversations",), partial(read_turns, column="conversations")),
    Schema("self-instruct", ("instruction", "instances"), read_instances),
    Schema("alpaca", ("instruction", "output"), _pairs("instruction", "output", context="input")),
    Schema("dolly", ("instruction", "context", "response"), _pairs("instruction", "response", context="context")),
    Schema("instruction/response", ("instruction", "response"), _pairs("instruction", "response", context="input")),
    Schema("prompt/completion", ("prompt", "completion"), _pairs("prompt", "completion")),
    Schema("question/answer", ("question", "answer"), _pairs("question", "answer")),
)


def detect_schema(columns: Collection[str], names: ColumnNames | None = None) -> Schema:
    """The schema of a file with these columns: the named columns' own, or else the first of `SCHEMAS` that fits.

    Raises:
        UserError: No schema fits, a named column is not there, or the names contradict each other.
    """
    names = names or ColumnNames()
    seen = ", ".join(sorted(columns)) or "none"
    given = {option: name for option, name in vars(names).items() if name is not None}
    for option, name in given.items():
        if name not in columns:
            raise UserError(f"--{option}-column names {name!r}, but the columns are: {seen}.")
    if (names.prompt is None) != (names.response is None):
        raise UserError("--prompt-column and --response-column go together: give both, or neither.")
    if names.messages is not None and names.prompt is not None:
        raise UserError("Give either --messages-column, or --prompt-column and --response-column, not both.")

    found: Schema | None
    if names.messages is not None:
        found = Schema("named columns", (names.messages,), partial(read_turns, column=names.messages))
    elif names.prompt is not None and names.response is not None:
        found = Schema("named columns", (names.prompt, names.response), _pairs(names.prompt, names.response))
    else:
        found = next((schema for schema in SCHEMAS if set(schema.columns) <= set(columns)), None)
        if found is None:
            known = "; ".join(f"{schema.name} ({', '.join(schema.columns)})" for schema in SCHEMAS)
            raise UserError(
                f"No known schema has these columns: {seen}. Known schemas and their columns: {known}. "
                "Name the columns with --messages-column, or with --prompt-column and --response-column "
                "(and --system-column)."
            )
    if names.system is None:
        return found
    return Schema(found.name, (*found.columns, names.system), partial(found.read, system=names.system))


def _turn(turn: Any, column: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"the column {column!r} has a turn that is {_kind(turn)}, not an object")
    speaker, content = map(turn.get, ("from", "value") if "from" in turn else ("role", "content"))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"the column {column!r} has a turn of the unknown role {speaker!r}")
    calls = turn.get("tool_calls") or turn.get("function_call") if role == "assistant" else None
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, column) for part in content)
    if not isinstance(content, str):
        raise RowError(f"the column {column!r} has a turn whose content is {_kind(content)}, not text")
    return {"role": role, "content": _joined(content, _json(calls, column)) if calls else content}


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


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _wrong(row, column, "text")
    return value


def _optional(row: Row, column: str) -> str:
    return "" if row.get(column) is None else _text(row, column)


def _wrong(row: Row, column: str, wanted: str) -> RowError:
    if column not in row:
        return RowError(f"the column {column!r} is missing")
    value = row[column]
    found = "an empty list" if value == [] else _kind(value)
    return RowError(f"the column {column!r} is {found}, not {wanted}")


def _kind(value: Any) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


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
