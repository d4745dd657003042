"""The law of the response mask: the assistant's own words and the end of its turn count, else the row is refused.

The answer sheet of every template family is transformers' own mask for the same template with generation marks.
"""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from raydpp.errors import RowError
from raydpp.gradients.chat_template import DEFAULT_TEMPLATE, ChatTemplate, template_of
from raydpp.gradients.config import Masking
from raydpp.gradients.tokenization import TokenizedExample, tokenize
from tests.gradients.chat_families import FAMILIES, byte_level, marked, published, word_pieces_with_space

TOKENIZERS = {"byte level": functools.cache(byte_level), "word pieces": functools.cache(word_pieces_with_space)}
WORDS = ["yes", "no", "Paris", "4", " in spring", "Is 4 even?", "é", "😀", " ", "\n", "\n\n", "\u3000"]
MARKUP = ["</s>", "<|im_end|>", "<|im_start|>assistant\n", "[INST]", "[/INST]", "<|eot_id|>", "<end_of_turn>\n", "<s>"]
MARKUP += ["<start_of_turn>model\n", "USER: ", "ASSISTANT: ", "<|end|>", "### Response:\n\n", "standin", "standin0q"]
THINK = ["<think>", "</think>", "<think>\n\n</think>\n\n"]


def texts(snippets: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(snippets), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, confusing: bool = False) -> list[dict[str, Any]]:
    """Few words, so that answers occur in prompts and in other answers, and the templates' own markup among them."""
    asked, said = texts(WORDS + MARKUP + THINK), texts(WORDS + MARKUP + THINK * confusing)
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(asked)})
    for _ in range(draw(st.integers(1, 3))):
        content, reasoning = draw(said), None
        match draw(st.sampled_from(["plain", "plain", "inline", "apart"])):
            case "inline" if (thought := draw(said)).strip():
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            case "apart" if (thought := draw(said)).strip():
                reasoning = thought
        messages.append({"role": "user", "content": draw(asked)})
        messages.append({"role": "assistant", "content": content, "reasoning_content": reasoning})
    if draw(st.integers(0, 4)) == 0:
        messages.append({"role": "user", "content": draw(asked)})
    return messages


def found(template: str, tokenizer: Any, messages: Any, end_of_turn: bool = True) -> TokenizedExample | str:
    tokenizer.chat_template = template
    try:
        return tokenize(messages, tokenizer, Masking(2**20, end_of_turn))
    except RowError as error:
        return str(error)


def wordless(messages: list[dict[str, Any]]) -> bool:
    return any(m["role"] == "assistant" and not m["content"].split("</think>")[-1].strip() for m in messages)


@pytest.mark.parametrize("pieces", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(messages=conversations(), end_of_turn=st.booleans())
def test_what_counts_is_what_the_assistant_wrote_and_the_end_of_its_turn(
    family: str, pieces: str, messages: list[dict[str, Any]], end_of_turn: bool
) -> None:
    hypothesis.assume(not wordless(messages))
    tokenizer = TOKENIZERS[pieces]()
    expected = found(marked(FAMILIES[family], end_of_turn), tokenizer, messages)
    actual = found(published(FAMILIES[family]), tokenizer, messages, end_of_turn)
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
        return
    assert spelled(actual, tokenizer) == spelled(expected, tokenizer)
    np.testing.assert_array_equal(actual.ids, expected.ids)


@pytest.mark.parametrize("pieces", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(messages=conversations(confusing=True))
def test_nothing_that_another_wrote_counts_whatever_is_in_the_text(
    family: str, pieces: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = TOKENIZERS[pieces]()
    actual = found(published(FAMILIES[family]), tokenizer, messages)
    expected = found(marked(FAMILIES[family]), tokenizer, messages)
    if not isinstance(actual, str):
        assert not isinstance(expected, str)
        length = len(actual.ids)
        np.testing.assert_array_equal(actual.ids, expected.ids[:length])
        assert not (actual.response & ~expected.response[:length]).any(), spelled(actual, tokenizer)


def spelled(example: TokenizedExample, tokenizer: Any) -> str:
    """The text, with ⟦ ⟧ around what counts."""
    text, inside = "", False
    for token, counts in zip(tokenizer.convert_ids_to_tokens(example.ids.tolist()), example.response, strict=True):
        text += ("⟦" if counts and not inside else "⟧" if inside and not counts else "") + token
        inside = bool(counts)
    return (text + "⟧" * inside).replace("Ġ", " ").replace("Ċ", "\n")


def said(template: str, *messages: dict[str, Any], end_of_turn: bool = True) -> list[str]:
    """The texts that count, of a conversation under a template as published."""
    tokenizer = TOKENIZERS["byte level"]()
    tokenizer.chat_template = published(template)
    chat = ChatTemplate.of(tokenizer)
    wanted = {n for n, message in enumerate(messages) if message["role"] == "assistant"}
    text, spans = chat.locate(chat.prepare(messages), wanted, end_of_turn)
    return [text[start:end] for start, end in spans]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_the_prompt_holds_too_counts_once(family: str) -> None:
    found = said(FAMILIES[family], user("Is 4 even? Say yes or no."), assistant("yes"), user("yes?"), assistant("4"))
    assert [text for text in found if text in ("yes", "4")] == ["yes", "4"]
    assert len(set(found)) <= 3  # the third is what ends a turn
    assert not set(found) & {"Is", "even", "Say"}


@pytest.mark.parametrize(
    ("family", "end"),
    [("Gemma 3", "<end_of_turn>"), ("Phi-3", "<|end|>"), ("Command-R", "<|END_OF_TURN_TOKEN|>"), ("Zephyr", "</s>")],
)
def test_a_turn_ends_with_what_the_template_writes_whatever_the_tokenizer_calls_it(family: str, end: str) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert said(FAMILIES[family], *messages) == ["b", end, "d", end]
    assert said(FAMILIES[family], *messages, user("e")) == ["b", end, "d", end]
    assert said(FAMILIES[family], *messages, end_of_turn=False) == ["b", "d"]


def test_a_turns_end_that_is_no_token_counts_too() -> None:
    template = FAMILIES["ChatML"].replace("<|im_end|>", "### End")
    assert said(template, user("a"), assistant("b")) == ["b"]  # two words: it could be anything
    assert said(template.replace("### ", "###"), user("a"), assistant("b")) == ["b", "###End"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_where_the_template_takes_it(key: str) -> None:
    template = FAMILIES["keeps all thinking"].replace("reasoning_content", key)
    thought = assistant("4", reasoning_content="add")
    assert said(template, user("2 + 2"), thought) == ["<think>\nadd\n</think>\n\n4", "<|im_end|>"]
    assert said(FAMILIES["ChatML"], user("2 + 2"), thought) == ["<think>\nadd\n</think>\n\n4", "<|im_end|>"]


def test_a_thinking_mark_that_the_prompt_ends_with_is_not_the_assistants() -> None:
    inline = assistant("<think>\nadd\n</think>\n\n4")
    assert said(FAMILIES["Qwen3-Thinking"], user("2 + 2"), inline) == ["add\n</think>\n\n4", "<|im_end|>"]
    assert said(FAMILIES["Qwen3"], user("2 + 2"), inline) == ["<think>\nadd\n</think>\n\n4", "<|im_end|>"]
    assert said(FAMILIES["DeepSeek-R1"], user("2 + 2"), inline)[0].strip() == "4"


def test_thinking_that_a_template_shows_apart_from_the_answer_counts_without_what_is_between() -> None:
    template = (
        "{% for m in messages %}{% if m.thinking %}<|start|>assistant<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    )
    assert said(template, user("2 + 2"), assistant("4", reasoning_content="add")) == ["add", "4", "<|end|>"]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("m.content + m.content", "more than once"),
        ("m.content | upper", "changes what the assistant wrote"),
        ("m.content | tojson", "changes what the assistant wrote"),
        ("m.content | replace('s', '')", "changes what the assistant wrote"),
        ("m.content[:3]", "changes what the assistant wrote"),
    ],
)
def test_what_cannot_be_located_is_refused_with_the_reason(expression: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        said(
            "{% for m in messages %}{{ m.role }}: {{ " + expression + " }}\n{% endfor %}",
            user("a"),
            assistant('yes "no"'),
        )


def test_a_template_that_leaves_a_turn_out_leaves_the_others() -> None:
    template = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    assert said(template, user("a"), assistant("b"), user("b"), assistant("b")) == ["b", "</s>"]


def test_a_clock_in_a_template_stands_still() -> None:
    tokenizer = TOKENIZERS["byte level"]()
    tokenizer.chat_template = "{{ strftime_now('%Y %H:%M:%S.%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = ChatTemplate.of(tokenizer)
    assert chat.render([user("a")]) == chat.render([user("a")])
    tokenizer.chat_template = "{%- set today = strftime_now('%d %b %Y') %}{{ today }} {{ messages[0].content }}"
    assert ChatTemplate.of(tokenizer).render([user("a")]) == "26 Jul 2024 a"


@pytest.mark.parametrize(
    ("pattern", "begins"), [("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False), ("$A", False)]
)
def test_a_base_model_gets_the_token_that_its_tokenizer_puts_before_a_text(pattern: str, begins: bool) -> None:
    from tokenizers import processors

    tokenizer = byte_level()
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=marks)
    assert template_of(tokenizer).removeprefix("{{ bos_token }}") == DEFAULT_TEMPLATE
    found = tokenize([user("Is 4 even?"), assistant("yes")], tokenizer, Masking())
    assert tokenizer.decode(found.ids) == "<s>" * begins + "User: Is 4 even?\n\nAssistant: yes</s>"
    assert (
        tokenizer.decode(found.ids[found.response]) == "yes</s>"
        or tokenizer.decode(found.ids[found.response]) == " yes</s>"
    )
    tokenizer.chat_template = published(FAMILIES["ChatML"])
    assert template_of(tokenizer) == tokenizer.chat_template
