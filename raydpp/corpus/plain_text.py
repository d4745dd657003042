"""From a conversation to the tokens of a text encoder, which knows no roles: the turns' texts, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydpp.corpus.conversation import Message
from raydpp.corpus.tokenization import TokenizedExample
from raydpp.errors import RowError


def tokenize_text(messages: Sequence[Message], tokenizer: Any, max_length: int) -> TokenizedExample:
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
