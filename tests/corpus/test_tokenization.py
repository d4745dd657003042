from __future__ import annotations

from typing import Any

import pytest

from raydpp.corpus.tokenization import DEFAULT_TEMPLATE, Masking, TokenizedExample, template_of, tokenize
from raydpp.errors import RowError
from raydpp.extraction.model import load_tokenizer

SYSTEM = {"role": "system", "content": "the sky"}
ASK = {"role": "user", "content": "what is a"}
ANSWER = {"role": "assistant", "content": "a b"}
CALL = {"role": "assistant", "content": "one"}
TOOL = {"role": "tool", "content": "two three"}


@pytest.fixture
def tokenizer(tiny_model: str) -> Any:
    return load_tokenizer(tiny_model)


def shown(example: TokenizedExample, tokenizer: Any) -> str:
    """The tokens, those of a response in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids.tolist())
    return " ".join(f"[{t}]" if r else t for t, r in zip(tokens, example.response, strict=True)).replace("\n", "|")


@pytest.mark.parametrize("end_of_turn", [True, False])
def test_every_assistant_turn_counts_and_nothing_else(tokenizer: Any, end_of_turn: bool) -> None:
    found = tokenize([SYSTEM, ASK, CALL, TOOL, ANSWER], tokenizer, Masking(end_of_turn=end_of_turn))
    end = "[<|im_end|>]" if end_of_turn else "<|im_end|>"
    assert shown(found, tokenizer) == (
        "<|im_start|> system | the sky <|im_end|> | <|im_start|> user | what is a <|im_end|> |"
        f" <|im_start|> assistant | [one] {end} | <|im_start|> tool | two three <|im_end|> |"
        f" <|im_start|> assistant | [a] [b]{' ' + end if end_of_turn else ''}"
    )
    assert not found.truncated


def test_an_answer_that_repeats_the_question_is_not_confused_with_it(tokenizer: Any) -> None:
    same = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "a b"}]
    found = shown(tokenize(same, tokenizer, Masking(end_of_turn=False)), tokenizer)
    assert found == "<|im_start|> user | a b <|im_end|> | <|im_start|> assistant | [a] [b]"


def test_the_templates_own_marks_win(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    )
    assert shown(tokenize([ASK, ANSWER], tokenizer, Masking()), tokenizer) == "what is a | [a] [b]"


def test_a_template_that_strips_content_is_followed(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    spaced = {"role": "assistant", "content": " \n a b \n"}
    assert shown(tokenize([ASK, spaced], tokenizer, Masking()), tokenizer).endswith("| [a] [b] [<|im_end|>]")


def test_a_base_model_gets_the_default_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert template_of(tokenizer) == DEFAULT_TEMPLATE
    found = tokenize([ASK, ANSWER], tokenizer, Masking())
    assert shown(found, tokenizer).endswith("[a] [b] [<|im_end|>]")
    assert found.response.sum() == 3


def test_truncation_keeps_the_response_and_is_recorded(tokenizer: Any) -> None:
    whole = tokenize([SYSTEM, ASK, ANSWER], tokenizer, Masking())
    cut = tokenize([SYSTEM, ASK, ANSWER], tokenizer, Masking(max_length=8))
    assert cut.truncated
    assert cut.ids.tolist() == whole.ids[-8:].tolist()
    assert cut.response.sum() == whole.response.sum() == 3
    long = {"role": "assistant", "content": "a b c " * 20}
    cut = tokenize([ASK, long], tokenizer, Masking(max_length=10))
    assert shown(cut, tokenizer).startswith("| [a] [b] [c]")  # one token to predict the first one from
    assert len(cut.ids) == 10
    assert cut.truncated


def test_what_has_no_response_token_is_refused(tokenizer: Any) -> None:
    empty = {"role": "assistant", "content": ""}
    with pytest.raises(RowError, match="no response token"):
        tokenize([ASK, empty], tokenizer, Masking(end_of_turn=False))


def test_what_the_template_refuses_is_refused_with_its_words(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(RowError, match="only user and assistant"):
        tokenize([ASK, ANSWER], tokenizer, Masking())
