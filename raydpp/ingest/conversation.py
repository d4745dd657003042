"""The record every stage works on: a conversation, a list of messages, and its id.

A message is `{"role": ..., "content": ...}`; the roles are system, user, assistant and tool. An assistant's may have
`reasoning_content`, its thinking before the answer, and `weight` 0, where it is context and not to be trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from raydpp.errors import RowError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")


def conversation_id(messages: Iterable[Message]) -> str:
    """The id of a conversation: a hash of all that a model sees, the same wherever it is read (32 hex digits).

    It is BLAKE2b (RFC 7693) of 16 bytes over the canonical JSON `[["role","content"],...]` (no spaces, UTF-8,
    nothing escaped that JSON allows as it is). A turn with more than these two has an object of the rest behind them,
    keys in order.
    """
    # A hash is uniform and independent of what the text is about: sorting by id is a shuffle that every run repeats,
    # and any range of ids is a random sample of the corpus.
    turns = [
        [message["role"], message["content"], *([more] if (more := _further(message)) else [])] for message in messages
    ]
    canonical = json.dumps(turns, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def validated(messages: Any, strip_markers: bool = True) -> list[Message]:
    """The messages of a conversation that can be trained on, with nothing but what a message has.

    Contents stay as they are, with one exception: a literal end-of-text marker that ends an assistant turn is
    removed (with white space that follows it), because the chat template writes its own.

    Raises:
        RowError: There are no messages, no assistant turn, only blank ones or only ones of weight 0, no user turn with
            text before the first assistant turn, an unknown role, a content that is not text, or text that UTF-8
            cannot write.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError("the conversation has no messages")
    given = [_message(message, turn) for turn, message in enumerate(messages, start=1)]
    checked = [_without_marker(message) if strip_markers else message for message in given]
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise RowError("the conversation has no assistant turn")
    if not _has_text(checked, "assistant"):
        only_marker = " but for an end-of-text marker" if _has_text(given, "assistant") else ""
        raise RowError(f"the response is empty{only_marker}")
    if not _has_text([message for message in checked if message.get("weight") != 0], "assistant"):
        raise RowError("every assistant turn is marked as context (weight 0, train or loss false)")
    opening = checked[: roles.index("assistant")]
    if not any(message["role"] == "user" for message in opening):
        raise RowError("there is no user turn before the first assistant turn")
    if not _has_text(opening, "user"):
        raise RowError("the prompt is empty")
    return checked


def _message(message: Any, turn: int) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"turn {turn} is not a message with a role and a content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"turn {turn} has the unknown role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"the content of turn {turn} is not text ({type(content).__name__})")
    checked = {"role": role, "content": content, **_further(message)}
    try:
        (content + checked.get("reasoning_content", "")).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"turn {turn} has text that is not valid Unicode (a lone surrogate)") from None
    return checked


def _further(message: Message) -> Message:
    """What an assistant's message has beside role and content; a weight that is not 0 is the same as none."""
    more = {}
    if message["role"] == "assistant" and message.get("reasoning_content"):
        more["reasoning_content"] = message["reasoning_content"]
    if message["role"] == "assistant" and message.get("weight") == 0:
        more["weight"] = 0
    return more


def _without_marker(message: Message) -> Message:
    content = message["content"]
    while message["role"] == "assistant":  # there may be several
        text = content.rstrip()
        marker = next((marker for marker in END_OF_TEXT if text.endswith(marker)), None)
        if marker is None or (marker == "</s>" and "<s>" in text):  # a closing tag of HTML
            break
        content = text.removesuffix(marker)
    return {**message, "content": content}


def _has_text(messages: list[Message], role: str) -> bool:
    return any(
        message["content"].strip() or message.get("reasoning_content")
        for message in messages
        if message["role"] == role
    )
