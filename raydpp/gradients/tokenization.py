"""From a conversation to token ids and the mask of its response tokens.

Which tokens an assistant wrote is read from the chat template's own ``{% generation %}`` marks where it has them,
else from character offsets in the rendered text; never by tokenising a prefix, which breaks where a token spans the
boundary. The tokenizer is anything that behaves like a fast transformers tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpp.errors import RowError
from raydpp.gradients.config import Masking

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""What a base model without a chat template gets: "User: ...", blank line, "Assistant: ..." and the end token."""

Messages = Sequence[Mapping[str, str]]
"""The turns of a conversation, each with its role and content."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One example, ready for the model.

    Attributes:
        ids: (s,) int32 token ids, ending with the last response token.
        response: (s,) bool, true where the token is part of a response (and so is predicted, and counts).
        truncated: Whether tokens were cut to fit ``max_length``.
    """

    ids: np.ndarray
    response: np.ndarray
    truncated: bool


def template_of(tokenizer: Any) -> str:
    """The chat template in use: the tokenizer's own, else DEFAULT_TEMPLATE."""
    own = tokenizer.chat_template
    return own if isinstance(own, str) else tokenizer.get_chat_template() if own else DEFAULT_TEMPLATE


def tokenize(messages: Messages, tokenizer: Any, masking: Masking) -> TokenizedExample:
    """Render, tokenise and mask one conversation; see Masking. Raises RowError with a reason."""
    template = template_of(tokenizer)
    if "{% generation %}" in template or "{%- generation" in template:
        encoded = _apply_template(messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        ids, response = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool)
    else:
        ids, response = _mask_by_offsets(messages, tokenizer, masking.end_of_turn)
    if not response[1:].any():  # the first token is never predicted
        raise RowError("no response token: nothing that the assistant wrote is left to predict")
    return _cut(ids, response, masking.max_length)


def _apply_template(messages: Messages, tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template_of(tokenizer), **options)
    except Exception as error:  # templates raise their own errors, in jinja2's classes, for roles they do not know
        raise RowError(f"the chat template refuses this conversation: {error}") from error


def _mask_by_offsets(messages: Messages, tokenizer: Any, end_of_turn: bool) -> tuple[np.ndarray, np.ndarray]:
    text = str(_apply_template(messages, tokenizer, tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], np.int32)  # (s,)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)  # (s, 2) characters [start, end)
    special = np.isin(ids, np.asarray(tokenizer.all_special_ids))  # (s,)
    response = np.zeros(len(ids), bool)
    for start, end, turn_end in _assistant_spans(messages, tokenizer, text):
        response |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        if end_of_turn:
            after = np.flatnonzero(special & (offsets[:, 0] >= end) & (offsets[:, 1] <= turn_end))
            response[after[:1]] = True
    return ids, response


def _assistant_spans(messages: Messages, tokenizer: Any, text: str) -> list[tuple[int, int, int]]:
    """Of every assistant turn, in characters: where its content starts and ends, and where the turn ends."""
    spans, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header_end = _prefix_length(messages[:index], tokenizer, text, open_turn=True)
        position = max(position, header_end or 0)
        content = message["content"] if message["content"] in text[position:] else message["content"].strip()
        start = text.find(content, position) if content else position
        if start < 0:
            raise RowError("the chat template does not show an assistant turn as it was written")
        end = start + len(content)
        turn_end = _prefix_length(messages[: index + 1], tokenizer, text)
        spans.append((start, end, len(text) if turn_end is None else turn_end))
        position = end
    return spans


def _prefix_length(messages: Messages, tokenizer: Any, text: str, open_turn: bool = False) -> int | None:
    """The length of these first messages' own rendering, if the whole conversation's text starts with it."""
    try:
        prefix = str(_apply_template(messages, tokenizer, tokenize=False, add_generation_prompt=open_turn))
    except RowError:  # some templates refuse to stop after a system turn, say
        return None
    return len(prefix) if text.startswith(prefix) else None


def _cut(ids: np.ndarray, response: np.ndarray, max_length: int) -> TokenizedExample:
    predicted = np.flatnonzero(response[1:]) + 1
    first, end = int(predicted[0]), int(predicted[-1]) + 1
    # Keep one token before the first response token: it is what the first one is predicted from.
    start = max(0, min(end - max_length, first - 1))
    stop = min(end, start + max_length)
    ids, response = ids[start:stop], response[start:stop].copy()
    response[0] = False
    return TokenizedExample(ids, response, truncated=start > 0 or stop < end)


def tokenize_for_encoder(messages: Messages, tokenizer: Any, max_length: int) -> TokenizedExample:
    """Tokenise the texts of all turns, the encoder's own special tokens around them.

    A text longer than ``max_length`` tokens loses its start first, then the end of what assistants wrote.

    Returns:
        Token ids, with the mask of those that assistants wrote.

    Raises:
        RowError: No token is an assistant's.
    """
    texts = [message["content"] for message in messages]
    encoded = tokenizer("\n".join(texts), return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int32)  # (s,)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)  # (s, 2) characters [start, end)
    own = np.flatnonzero(~np.asarray(encoded["special_tokens_mask"], bool))  # what is not the encoder's frame
    response = np.zeros(len(ids), bool)
    position = 0
    for message, text in zip(messages, texts, strict=True):
        if message["role"] == "assistant":
            inside = (offsets[own, 0] < position + len(text)) & (offsets[own, 1] > position)
            response[own[inside]] = True
        position += len(text) + 1
    written = np.flatnonzero(response)
    if not len(written):
        raise RowError("no response token: the encoder's tokenizer leaves nothing of what the assistant wrote")
    begin, end = int(own[0]), int(own[-1]) + 1
    room = max(1, max_length - (len(ids) - (end - begin)))
    if end - begin <= room:
        return TokenizedExample(ids, response, truncated=False)
    start = max(begin, min(int(written[-1]) + 1 - room, int(written[0])))
    kept = np.r_[0:begin, start : min(start + room, end), end : len(ids)]
    return TokenizedExample(ids[kept], response[kept], truncated=True)
