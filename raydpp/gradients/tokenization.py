"""From a conversation to token ids and the mask of its response tokens.

Which tokens an assistant wrote is read from the chat template's own ``{% generation %}`` marks where it has them, else
from where ``chat_template`` located its words; never by tokenising a prefix, which breaks where a token spans the
boundary. The tokenizer is anything that behaves like a fast transformers tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpp.errors import RowError
from raydpp.gradients.chat_template import ChatTemplate, Messages, Span, is_response, with_reasoning
from raydpp.gradients.config import Masking

MASK_RULE = "assistant turns located by stand-ins"
"""Which rule the mask follows: part of the fingerprint, since another rule gives other numbers."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One example, ready for the model.

    Attributes:
        ids: (s,) int32 token ids, ending with the last response token.
        response: (s,) bool, true where the token is part of a response (and so is predicted, and counts).
        cut: How many tokens were left out to fit ``max_length``.
    """

    ids: np.ndarray
    response: np.ndarray
    cut: int


def tokenize(messages: Messages, tokenizer: Any, masking: Masking) -> TokenizedExample:
    """Render, tokenise and mask one conversation; see Masking. Raises RowError with a reason."""
    template = ChatTemplate.of(tokenizer)
    turns = template.prepare(messages)
    responses = {n for n, message in enumerate(messages) if is_response(message)}
    if template.marks_generation:
        encoded = template.apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, response = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool)
        contexts = {n for n, message in enumerate(messages) if message["role"] == "assistant"} - responses
        if contexts:
            response &= ~_mask(*template.locate(turns, contexts, end_of_turn=True), tokenizer)[1]
    else:
        ids, response = _mask(*template.locate(turns, responses, masking.end_of_turn), tokenizer)
    if not response[1:].any():  # the first token is never predicted
        raise RowError("no response token: nothing that the assistant wrote is left to predict")
    return _cut(ids, response, masking.max_length)


def _mask(text: str, spans: list[Span], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of a text, and which of them hold a character of a span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)  # (s, 2) characters [start, end)
    inside = np.zeros(len(offsets), bool)  # (s,)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return np.asarray(encoded["input_ids"], np.int32), inside


def _kept_of_prompt(length: int, max_length: int) -> int:
    """How many of the tokens before the first response token are kept in any case: no answer without its question."""
    return min(length, max(max_length // 4, min(32, max_length // 2)))


def _cut(ids: np.ndarray, response: np.ndarray, max_length: int) -> TokenizedExample:
    predicted = np.flatnonzero(response[1:]) + 1
    first, end = int(predicted[0]), int(predicted[-1]) + 1
    start = max(0, min(end - max_length, first - _kept_of_prompt(first, max_length)))
    stop = min(end, start + max_length)
    kept, counts = ids[start:stop], response[start:stop].copy()
    counts[0] = False
    return TokenizedExample(kept, counts, cut=end - (stop - start))


def tokenize_for_encoder(messages: Messages, tokenizer: Any, max_length: int) -> TokenizedExample:
    """Tokenise the texts of all turns, the encoder's own special tokens around them.

    A text longer than ``max_length`` tokens loses its start first, then its end; see Masking.

    Returns:
        Token ids, with the mask of those that assistants wrote.

    Raises:
        RowError: No token is an assistant's.
    """
    texts = [with_reasoning(message) for message in messages]
    encoded = tokenizer("\n".join(texts), return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int32)  # (s,)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)  # (s, 2) characters [start, end)
    own = np.flatnonzero(~np.asarray(encoded["special_tokens_mask"], bool))  # what is not the encoder's frame
    response = np.zeros(len(ids), bool)
    position = 0
    for message, text in zip(messages, texts, strict=True):
        if is_response(message):
            inside = (offsets[own, 0] < position + len(text)) & (offsets[own, 1] > position)
            response[own[inside]] = True
        position += len(text) + 1
    written = np.flatnonzero(response)
    if not len(written):
        raise RowError("no response token: the encoder's tokenizer leaves nothing of what the assistant wrote")
    begin, end = int(own[0]), int(own[-1]) + 1
    room = max(1, max_length - (len(ids) - (end - begin)))
    if end - begin <= room:
        return TokenizedExample(ids, response, cut=0)
    first = int(written[0])
    start = max(begin, min(int(written[-1]) + 1 - room, first - _kept_of_prompt(first - begin, room)))
    kept = np.r_[0:begin, start : min(start + room, end), end : len(ids)]
    return TokenizedExample(ids[kept], response[kept], cut=len(ids) - len(kept))
