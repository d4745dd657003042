from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from raydpp.errors import RowError
from raydpp.ingest.conversation import conversation_id, validated


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_the_id_never_changes() -> None:
    # hashlib.blake2b('[["user","Hé"],["assistant","\u2028"]]'.encode(), digest_size=16).hexdigest()
    messages = turns(("user", "Hé"), ("assistant", "\u2028"))
    assert conversation_id(messages) == "f584ddee2855c09e42429a7d424c59cd"
    assert conversation_id([{"content": "Hé", "role": "user"}, messages[1]]) == "f584ddee2855c09e42429a7d424c59cd"


def test_the_id_tells_conversations_apart() -> None:
    variants = [
        turns(("user", "a"), ("assistant", "b")),
        turns(("user", "a "), ("assistant", "b")),
        turns(("user", "A"), ("assistant", "b")),
        turns(("system", "a"), ("assistant", "b")),
        turns(("user", "ab"), ("assistant", "")),
        turns(("user", 'a"],["assistant","b')),
    ]
    assert len({conversation_id(messages) for messages in variants}) == len(variants)


def test_ids_are_uniform() -> None:
    first_digits = [conversation_id(turns(("user", f"question {n}")))[0] for n in range(1600)]
    counts = [first_digits.count(digit) for digit in "0123456789abcdef"]
    assert sum((count - 100) ** 2 / 100 for count in counts) < 37.7  # chi-squared, 15 degrees, p = 0.001


def test_contents_are_kept_and_other_keys_are_not() -> None:
    messages = turns(("system", "  S "), ("user", "\nHi  "), ("assistant", " yes \n"), ("tool", ""), ("assistant", ""))
    assert validated([{**message, "weight": 1, "name": None, "rest": {}} for message in messages]) == messages
    of_others = [{**message, "weight": 0, "reasoning_content": "R"} for message in messages[:2]]
    assert validated([*of_others, *messages[2:]]) == messages
    thought = {**messages[2], "weight": 0, "reasoning_content": "R"}
    assert validated([*messages[:2], thought, *messages]) == [*messages[:2], thought, *messages]


@pytest.mark.parametrize("marker", ["<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_a_trailing_end_of_text_marker_goes(marker: str) -> None:
    given = turns(("user", f"Q{marker}"), ("assistant", f"A{marker}B {marker}"), ("assistant", f"C{marker}{marker}\n"))
    expected = turns(("user", f"Q{marker}"), ("assistant", f"A{marker}B "), ("assistant", "C"))
    assert validated(given) == expected
    with pytest.raises(RowError, match="the response is empty but for an end-of-text marker"):
        validated(turns(("user", "Q"), ("assistant", marker)))
    assert validated(given, strip_markers=False) == given
    assert validated(turns(("user", "Q"), ("assistant", "A" + f"{marker} " * 2000))) == turns(
        ("user", "Q"), ("assistant", "A")
    )


def test_a_closing_html_tag_stays() -> None:
    messages = turns(("user", "strike it"), ("assistant", "<s>it</s>"))
    assert validated(messages) == messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (None, "no messages"),
        ("text", "no messages"),
        (["text"], "turn 1 is not a message"),
        (turns(("user", "Q")), "no assistant turn"),
        (turns(("user", "Q"), ("assistant", " \n"), ("assistant", "")), "the response is empty"),
        (turns(("user", "Q"), ("assistant", " ")), "the response is empty"),
        ([*turns(("user", "Q")), {"role": "assistant", "content": "A", "weight": 0}], "every assistant turn is marked"),
        (turns(("assistant", "A"), ("user", "Q")), "no user turn before"),
        (turns(("system", "S"), ("assistant", "A")), "no user turn before"),
        (turns(("user", " "), ("assistant", "A")), "the prompt is empty"),
        (turns(("narrator", "Q"), ("assistant", "A")), "unknown role 'narrator'"),
        (turns((["user"], "Q"), ("assistant", "A")), "unknown role"),
        (turns(("user", "Q"), ("assistant", None)), r"turn 2 is not text \(NoneType\)"),
        (turns(("user", 3), ("assistant", "A")), r"turn 1 is not text \(int\)"),
        (turns(("user", "Q"), ("assistant", "A\ud83d")), "turn 2 .*lone surrogate"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_a_reason(messages: Sequence[Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        validated(messages)
