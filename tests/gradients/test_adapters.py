from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydpp.errors import UserError
from raydpp.gradients.adapters import attach_adapter, choose_layers
from raydpp.gradients.config import Adapter
from raydpp.gradients.model import load_model

CPU = torch.device("cpu")
NAMES = ["model.layers.2.mlp", "model.layers.9.mlp", "model.layers.10.attention", "model.layers.10.mlp", "model.norm"]
Build = Callable[..., Any]


def attached(folder: str, adapter: Adapter) -> Any:
    return attach_adapter(load_model(folder, CPU), adapter)


def test_a_fresh_adapter_is_on_every_linear_layer_but_the_head(tiny_model: str) -> None:
    shapes = {layer.name: layer.shape for layer in attached(tiny_model, Adapter())[1]}
    assert len(shapes) == 2 * 7
    assert shapes["model.layers.0.self_attn.q_proj"] == (32, 32)
    assert shapes["model.layers.1.mlp.up_proj"] == (48, 32)


def test_named_targets_alone_are_adapted(tiny_model: str) -> None:
    _, layers = attached(tiny_model, Adapter(targets=("q_proj", "up_proj")))
    assert {layer.name.split(".")[-1] for layer in layers} == {"q_proj", "up_proj"}
    _, layers = attached(tiny_model, Adapter(targets=("q_proj",), layers="last:1"))
    assert [layer.name for layer in layers] == ["model.layers.1.self_attn.q_proj"]
    _, layers = attached(tiny_model, Adapter(targets=("mlp.up_proj", "up_proj")))
    assert len(layers) == 2  # a layer that two targets mean counts once


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_fresh_adapter_leaves_the_model_as_it_was(
    architecture: str, model_folder: Build, load: Build, examples: Build
) -> None:
    folder = model_folder(architecture)
    untouched = load(folder, torch.float32)
    model, _ = attached(folder, Adapter())
    ids = torch.from_numpy(examples(12)[0].ids.astype("int64"))[None]
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in untouched.named_modules()
    }
    assert not any("peft" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_the_model_is_frozen_and_in_evaluation_mode(kind: str, model_folder: Build, saved_adapter: Build) -> None:
    folder = model_folder("gpt2")
    model, layers = attached(folder, Adapter(saved_adapter(folder) if kind == "trained" else kind))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert len(layers) == {"fresh": 8, "trained": 16}[kind]


def test_a_trained_adapter_changes_what_the_model_computes(
    model_folder: Build, load: Build, saved_adapter: Build, examples: Build
) -> None:
    folder = model_folder("llama")
    ids = torch.from_numpy(examples(12)[0].ids.astype("int64"))[None]
    model, _ = attached(folder, Adapter(saved_adapter(folder)))
    plain = load(folder, torch.float32)(input_ids=ids).logits
    assert (model(input_ids=ids).logits - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last:1", [2, 3]),
        ("last:2", [1, 2, 3]),
        ("last:10", [0, 1, 2, 3]),
        ("mlp$", [0, 1, 3]),
        (r"\.(2|9)\.|norm", [0, 1, 4]),
    ],
)
def test_layers_are_all_the_last_blocks_or_what_an_expression_finds(layers: str, chosen: list[int]) -> None:
    assert choose_layers(NAMES, layers) == [NAMES[i] for i in chosen]


@pytest.mark.parametrize("kind", ["fresh", "trained"])
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("no_such_layer", r"means no layer of this model.*names such as .*layers\.\d"),
        ("last:0", "means no layer of this model"),
        ("(", "is not a regular expression"),
    ],
)
def test_layers_that_mean_nothing_are_refused(
    kind: str, layers: str, words: str, model_folder: Build, saved_adapter: Build
) -> None:
    folder = model_folder("llama")
    with pytest.raises(UserError, match=words):
        attached(folder, Adapter(saved_adapter(folder) if kind == "trained" else kind, layers=layers))


@pytest.mark.parametrize("target", ["nowhere", "proj", "embed_tokens", "layers.0"])
def test_a_target_that_is_no_linear_layer_is_refused(tiny_model: str, target: str) -> None:
    with pytest.raises(
        UserError, match=rf"--lora-targets {target}: no linear layer .*it has down_proj, gate_proj, k_proj"
    ):
        attached(tiny_model, Adapter(targets=("q_proj", target)))


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"], "lora_dropout": 0.0}, "mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trained_adapter_with_more_than_plain_lora_is_refused(
    options: dict[str, Any], trained: str, model_folder: Build, saved_adapter: Build
) -> None:
    folder = model_folder("qwen2")
    with pytest.raises(UserError, match=rf"trains \S*{trained}\S*: only plain LoRA"):
        attached(folder, Adapter(saved_adapter(folder, **options)))


def test_what_is_no_adapter_of_this_model_is_refused(
    tiny_model: str, model_folder: Build, saved_adapter: Build, tmp_path: Path
) -> None:
    of_gpt2 = saved_adapter(model_folder("gpt2"), target_modules=["c_attn"])
    for kind in (str(tmp_path), str(tmp_path / "nowhere"), "no/such-adapter", tiny_model, of_gpt2):
        with pytest.raises(UserError, match=r"could not be loaded: .*Give fresh, or a folder"):
            attached(tiny_model, Adapter(kind))
    of_another_width = saved_adapter(model_folder("llama"))
    with pytest.raises(UserError, match="could not be loaded"):
        attached(tiny_model, Adapter(of_another_width))


def test_an_adapter_that_is_a_pickle_is_refused_with_the_command_that_converts_it(
    model_folder: Build, saved_adapter: Build
) -> None:
    from safetensors.torch import load_file

    folder = model_folder("llama")
    adapter = Path(saved_adapter(folder))
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"are pickles \(.bin\)") as caught:
        attached(folder, Adapter(str(adapter)))
    exec(shlex.split(str(caught.value).partition("once: ")[2])[2], {})
    model, _ = attached(folder, Adapter(str(adapter)))
    held = dict(model.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(held[name.replace(".weight", ".default.weight")], weight)


def test_an_adapter_that_lacks_some_of_the_models_layers_is_refused(
    model_folder: Build, saved_adapter: Build, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    deeper = LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=1)
    LlamaForCausalLM(deeper).save_pretrained(tmp_path / "deeper")
    with pytest.raises(UserError, match="missing adapter keys"):
        attached(str(tmp_path / "deeper"), Adapter(saved_adapter(model_folder("llama"), target_modules=["q_proj"])))


def test_a_fresh_adapter_on_fused_experts_is_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="means no layer of this model"):
        attached(str(tmp_path), Adapter(layers="mlp"))


def test_a_pattern_means_the_same_modules_for_every_kind_of_adapter(model_folder: Build, saved_adapter: Build) -> None:
    folder = model_folder("llama")
    for kind in ("fresh", saved_adapter(folder)):
        _, layers = attached(folder, Adapter(kind, layers=r"q_proj$"))
        assert {re.sub(r"\.lora_[AB]$", "", layer.name).rsplit(".", 1)[-1] for layer in layers} == {"q_proj"}


def test_of_a_model_that_sees_pictures_the_text_decoders_layers_are_taken() -> None:
    import transformers

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {**SMALL, "head_dim": 8, "sliding_window": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert any("vision" in name and "q_proj" in name for name, _ in model.named_modules())
    for adapter, count in ((Adapter(), 14), (Adapter(layers="last:1"), 7), (Adapter(targets=("q_proj",)), 2)):
        _, layers = attach_adapter(model, adapter)
        assert len(layers) == count
        assert not any("vision" in layer.name for layer in layers)
    assert {layer.name.split(".layers.")[1][0] for layer in attach_adapter(model, Adapter(layers="last:1"))[1]} == {"1"}


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_key_value_heads": 2, "eos_token_id": 2},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_fused_experts_does_not_pass_for_what_is_beside_them(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SMALL, **MIXTURES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for layers in ("all", "last:1"):
        with pytest.raises(UserError, match=r"^\d+% of the weights .*experts.*--layers self_attn"):
            attach_adapter(model, Adapter(layers=layers))
    _, chosen = attach_adapter(model, Adapter(layers="self_attn"))  # whoever names a part wants it
    assert len(chosen) == 2 * 4
    assert all("self_attn" in layer.name for layer in chosen)


@pytest.mark.parametrize(("experts", "said"), [(4, r"^\d+% .*experts"), (0, "")])
def test_a_small_part_that_is_not_seen_is_said(experts: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(8, 60)
    model.experts = torch.nn.Parameter(torch.zeros(experts, 4, 4))
    attach_adapter(model, Adapter())
    assert [bool(re.search(said, record.message)) for record in caplog.records] == ([True] if said else [])


def test_a_model_that_calls_its_head_a_decoder_has_all_of_its_layers() -> None:
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    marks: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    sizes = {name: size for name, size in SMALL.items() if name != "num_key_value_heads"}
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, **marks))
    _, layers = attach_adapter(model, Adapter())
    assert {layer.name for layer in layers} == {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "decoder"
    }


class Packed(torch.nn.Linear):
    """A linear layer whose weight is kept as bytes, four numbers in a row, as 4-bit quantisation does."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.exact = like.weight.detach()
        self.weight = torch.nn.Parameter(torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8), False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.exact)


class PackedElsewhere(torch.nn.Module):
    """The same without being a torch.nn.Linear, as GPTQ's and AWQ's layers are."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.exact = like.weight.detach()
        self.register_buffer("qweight", torch.zeros(like.in_features // 8, like.out_features, dtype=torch.int32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.exact)


@pytest.mark.parametrize("kind", [Packed, PackedElsewhere])
def test_layers_with_packed_weights_are_as_large_as_those_they_stand_for(kind: Any, tiny_model: str) -> None:
    model: Any = load_model(tiny_model, CPU)
    _, expected = attach_adapter(load_model(tiny_model, CPU), Adapter())
    for block in model.model.layers:
        for part, name in ((block.self_attn, "q_proj"), (block.mlp, "up_proj")):
            setattr(part, name, kind(getattr(part, name)))
    _, found = attach_adapter(model, Adapter())
    assert [(layer.name, layer.shape) for layer in found] == [(layer.name, layer.shape) for layer in expected]
