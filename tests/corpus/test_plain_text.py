from __future__ import annotations

from typing import Any

import pytest

from raydpp.corpus.plain_text import tokenize_text
from raydpp.corpus.tokenization import TokenizedExample
from raydpp.errors import RowError

SYSTEM = {"role": "system", "content": "the sky"}
ASK = {"role": "user", "content": "what is a"}
ANSWER = {"role": "assistant", "content": "a bluebell"}
AGAIN = {"role": "user", "content": "and b"}
MORE = {"role": "assistant", "content": "one two"}
WORDS = "what is the of a b blue ##bell and one two three sky"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
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
    """The tokens, those of a response in parentheses."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids.tolist())
    return " ".join(f"({t})" if r else t for t, r in zip(tokens, example.response, strict=True))


def test_every_assistant_turn_counts_and_nothing_else(tokenizer: Any) -> None:
    found = tokenize_text([SYSTEM, ASK, ANSWER, AGAIN, MORE], tokenizer, 64)
    assert shown(found, tokenizer) == "[CLS] the sky what is a (a) (blue) (##bell) and b (one) (two) [SEP]"
    assert not found.truncated
    assert found.ids.dtype == "int32"


def test_marks_of_the_encoder_within_a_text_are_text(tokenizer: Any) -> None:
    says = {"role": "assistant", "content": "one [SEP] two"}
    assert shown(tokenize_text([ASK, says], tokenizer, 64), tokenizer) == ("[CLS] what is a (one) ([SEP]) (two) [SEP]")


def test_characters_that_the_tokenizer_drops_or_changes_move_nothing(tokenizer: Any) -> None:
    asks = {"role": "user", "content": "  WHAT\u200b \u00e1\t\n"}
    assert shown(tokenize_text([asks, {"role": "assistant", "content": " \u00c1 B "}], tokenizer, 64), tokenizer) == (
        "[CLS] what a (a) (b) [SEP]"
    )


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (8, "[CLS] what is a (a) (blue) (##bell) [SEP]"),
        (7, "[CLS] is a (a) (blue) (##bell) [SEP]"),
        (5, "[CLS] (a) (blue) (##bell) [SEP]"),
        (4, "[CLS] (a) (blue) [SEP]"),
        (3, "[CLS] (a) [SEP]"),
    ],
)
def test_what_is_too_long_loses_its_start_then_the_end_of_the_response(
    tokenizer: Any, max_length: int, expected: str
) -> None:
    found = tokenize_text([ASK, ANSWER], tokenizer, max_length)
    assert shown(found, tokenizer) == expected
    assert len(found.ids) == max_length
    assert found.truncated == (max_length < 8)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (10, "[CLS] a (a) (blue) (##bell) and b (one) (two) [SEP]"),
        (9, "[CLS] (a) (blue) (##bell) and b (one) (two) [SEP]"),
        (8, "[CLS] (a) (blue) (##bell) and b (one) [SEP]"),
        (6, "[CLS] (a) (blue) (##bell) and [SEP]"),
    ],
)
def test_the_first_response_is_kept_before_the_last(tokenizer: Any, max_length: int, expected: str) -> None:
    assert shown(tokenize_text([ASK, ANSWER, AGAIN, MORE], tokenizer, max_length), tokenizer) == expected


def test_what_follows_the_last_response_goes_before_the_response(tokenizer: Any) -> None:
    found = tokenize_text([ASK, ANSWER, AGAIN], tokenizer, 6)
    assert shown(found, tokenizer) == "[CLS] a (a) (blue) (##bell) [SEP]"


def test_a_tokenizer_without_special_tokens_loses_none() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    found = tokenize_text([{"role": "user", "content": "a a a"}, {"role": "assistant", "content": "b"}], plain, 2)
    assert shown(found, plain) == "a (b)"
    assert found.truncated


def test_the_line_ends_around_a_response_are_no_part_of_it() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "\n": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "ba"), ("user", "b"))]
    assert shown(tokenize_text(turns, plain, 64), plain) == "a \n (b) (a) \n b"


def test_truncation_saved_with_the_tokenizer_does_not_cut_the_response(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=32)
    assert shown(tokenize_text([ASK, ANSWER], tokenizer, 64), tokenizer) == (
        "[CLS] what is a (a) (blue) (##bell) [SEP]"
    )


@pytest.mark.parametrize("messages", [[ASK], [ASK, {"role": "assistant", "content": " \n\u200b"}], []])
def test_a_text_without_a_response_token_is_refused_with_a_reason(messages: list[Any], tokenizer: Any) -> None:
    with pytest.raises(RowError, match="no response token"):
        tokenize_text(messages, tokenizer, 64)
