from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raydpp.errors import RowError
from raydpp.gradients.chat_template import DEFAULT_TEMPLATE, template_of
from raydpp.gradients.config import Masking
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.tokenization import (
    TokenizedExample,
    tokenize,
    tokenize_for_encoder,
)

SYSTEM = {"role": "system", "content": "the sky"}
ASK = {"role": "user", "content": "what is a"}
ANSWER = {"role": "assistant", "content": "a b"}
CALL = {"role": "assistant", "content": "one"}
TOOL = {"role": "tool", "content": "two three"}
REPLY = {"role": "assistant", "content": "a bluebell"}
AGAIN = {"role": "user", "content": "and b"}
MORE = {"role": "assistant", "content": "one two"}
WORDS = "what is the of a b blue ##bell and one two three sky"


@pytest.fixture
def tokenizer(tiny_model: str) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def encoder() -> Any:
    """Word pieces between [CLS] and [SEP], as BERT's tokenizer makes them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def shown(example: TokenizedExample, tokenizer: Any) -> str:
    """The tokens, those of a response in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids.tolist())
    return " ".join(f"[{t}]" if r else t for t, r in zip(tokens, example.response, strict=True)).replace("\n", "|")


def framed(example: TokenizedExample, encoder: Any) -> str:
    """The tokens, those of a response in parentheses."""
    tokens = encoder.convert_ids_to_tokens(example.ids.tolist())
    return " ".join(f"({t})" if r else t for t, r in zip(tokens, example.response, strict=True))


@pytest.mark.parametrize("end_of_turn", [True, False])
def test_every_assistant_turn_counts_and_nothing_else(tokenizer: Any, end_of_turn: bool) -> None:
    found = tokenize([SYSTEM, ASK, CALL, TOOL, ANSWER], tokenizer, Masking(end_of_turn=end_of_turn))
    end = "[<|im_end|>]" if end_of_turn else "<|im_end|>"
    assert shown(found, tokenizer) == (
        "<|im_start|> system | the sky <|im_end|> | <|im_start|> user | what is a <|im_end|> |"
        f" <|im_start|> assistant | [one] {end} | <|im_start|> tool | two three <|im_end|> |"
        f" <|im_start|> assistant | [a] [b]{' ' + end if end_of_turn else ''}"
    )
    assert not found.cut


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
    assert cut.cut == len(whole.ids) - 8
    assert cut.ids.tolist() == whole.ids[-8:].tolist()
    assert cut.response.sum() == whole.response.sum() == 3
    long = {"role": "assistant", "content": "a b c " * 20}
    cut = tokenize([ASK, long], tokenizer, Masking(max_length=10))
    assert shown(cut, tokenizer).startswith("<|im_end|> | <|im_start|> assistant | [a] [b] [c]")
    assert len(cut.ids) == 10
    assert cut.cut == len(tokenize([ASK, long], tokenizer, Masking()).ids) - 10


@pytest.mark.parametrize("marks", [False, True])
def test_a_turn_of_weight_0_is_context(tokenizer: Any, marks: bool) -> None:
    if marks:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
            "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
        )
        assert "generation" in tokenizer.chat_template
    found = tokenize([ASK, {**REPLY, "weight": 0}, AGAIN, {**MORE, "weight": 1}], tokenizer, Masking())
    assert shown(found, tokenizer).endswith("assistant | [one] [two] [<|im_end|>]")
    assert found.response.sum() == 3
    with pytest.raises(RowError, match="no response token"):
        tokenize([ASK, {**ANSWER, "weight": 0}], tokenizer, Masking())


@pytest.mark.parametrize("max_length", [8, 20, 64, 200])
def test_no_answer_loses_all_of_its_question(tokenizer: Any, max_length: int) -> None:
    asks, answers = {"role": "user", "content": "what is " * 100}, {"role": "assistant", "content": "a b c " * 100}
    cut = tokenize([asks, answers, AGAIN, MORE], tokenizer, Masking(max_length))
    first = int(np.flatnonzero(cut.response)[0])
    assert first >= max(max_length // 4, min(32, max_length // 2))
    assert len(cut.ids) == max_length
    assert cut.response[first:].all()


def test_reasoning_is_part_of_the_response(tokenizer: Any, encoder: Any) -> None:
    thought = {"role": "assistant", "content": "a b", "reasoning_content": "one two"}
    found = shown(tokenize([ASK, thought], tokenizer, Masking()), tokenizer)
    assert found.endswith("[one] [two] [|] [<unk>] [|] [|] [a] [b] [<|im_end|>]")
    assert "(one) (two)" in framed(tokenize_for_encoder([ASK, thought], encoder, 64), encoder)


def test_a_turn_of_weight_0_is_no_response_for_an_encoder(encoder: Any) -> None:
    found = tokenize_for_encoder([ASK, {**CALL, "weight": 0}, AGAIN, MORE], encoder, 64)
    assert framed(found, encoder) == "[CLS] what is a one and b (one) (two) [SEP]"


def test_what_has_no_response_token_is_refused(tokenizer: Any) -> None:
    empty = {"role": "assistant", "content": ""}
    with pytest.raises(RowError, match="no response token"):
        tokenize([ASK, empty], tokenizer, Masking(end_of_turn=False))


def test_what_the_template_refuses_is_refused_with_its_words(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(RowError, match="only user and assistant"):
        tokenize([ASK, ANSWER], tokenizer, Masking())


def test_an_encoder_sees_every_turn_and_responses_are_marked(encoder: Any) -> None:
    found = tokenize_for_encoder([SYSTEM, ASK, REPLY, AGAIN, MORE], encoder, 64)
    assert framed(found, encoder) == "[CLS] the sky what is a (a) (blue) (##bell) and b (one) (two) [SEP]"
    assert not found.cut
    assert found.ids.dtype == "int32"


def test_marks_of_the_encoder_within_a_text_are_text(encoder: Any) -> None:
    says = {"role": "assistant", "content": "one [SEP] two"}
    found = tokenize_for_encoder([ASK, says], encoder, 64)
    assert framed(found, encoder) == "[CLS] what is a (one) ([SEP]) (two) [SEP]"


def test_characters_that_the_tokenizer_drops_or_changes_move_nothing(encoder: Any) -> None:
    asks = {"role": "user", "content": "  WHAT\u200b \u00e1\t\n"}
    found = tokenize_for_encoder([asks, {"role": "assistant", "content": " \u00c1 B "}], encoder, 64)
    assert framed(found, encoder) == "[CLS] what a (a) (b) [SEP]"


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (8, "[CLS] what is a (a) (blue) (##bell) [SEP]"),
        (7, "[CLS] is a (a) (blue) (##bell) [SEP]"),
        (5, "[CLS] a (a) (blue) [SEP]"),
        (4, "[CLS] a (a) [SEP]"),
        (3, "[CLS] (a) [SEP]"),
    ],
)
def test_what_is_too_long_loses_its_start_then_the_end_of_the_response(
    encoder: Any, max_length: int, expected: str
) -> None:
    found = tokenize_for_encoder([ASK, REPLY], encoder, max_length)
    assert framed(found, encoder) == expected
    assert len(found.ids) == max_length
    assert found.cut == 8 - max_length


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (12, "[CLS] what is a (a) (blue) (##bell) and b (one) (two) [SEP]"),
        (10, "[CLS] what is a (a) (blue) (##bell) and b [SEP]"),
        (8, "[CLS] what is a (a) (blue) (##bell) [SEP]"),
        (6, "[CLS] is a (a) (blue) [SEP]"),
    ],
)
def test_the_first_response_and_its_question_come_before_the_last(encoder: Any, max_length: int, expected: str) -> None:
    assert framed(tokenize_for_encoder([ASK, REPLY, AGAIN, MORE], encoder, max_length), encoder) == expected


def test_what_follows_the_last_response_goes_before_the_response(encoder: Any) -> None:
    found = tokenize_for_encoder([ASK, REPLY, AGAIN], encoder, 6)
    assert framed(found, encoder) == "[CLS] is a (a) (blue) [SEP]"


def test_a_tokenizer_without_special_tokens_loses_none() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    turns = [{"role": "user", "content": "a a a"}, {"role": "assistant", "content": "b"}]
    found = tokenize_for_encoder(turns, plain, 2)
    assert framed(found, plain) == "a (b)"
    assert found.cut


def test_the_line_ends_around_a_response_are_no_part_of_it() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "\n": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "ba"), ("user", "b"))]
    assert framed(tokenize_for_encoder(turns, plain, 64), plain) == "a \n (b) (a) \n b"


def test_truncation_saved_with_the_tokenizer_does_not_cut_the_response(encoder: Any) -> None:
    encoder.backend_tokenizer.enable_truncation(4)
    encoder.backend_tokenizer.enable_padding(length=32)
    found = tokenize_for_encoder([ASK, REPLY], encoder, 64)
    assert framed(found, encoder) == "[CLS] what is a (a) (blue) (##bell) [SEP]"


@pytest.mark.parametrize("messages", [[ASK], [ASK, {"role": "assistant", "content": " \n\u200b"}], []])
def test_a_text_without_a_response_token_is_refused_with_a_reason(messages: list[Any], encoder: Any) -> None:
    with pytest.raises(RowError, match="no response token"):
        tokenize_for_encoder(messages, encoder, 64)
