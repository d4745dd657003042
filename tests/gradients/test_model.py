from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raydpp.errors import UserError
from raydpp.gradients.model import (
    Lora,
    load_config,
    load_model,
    load_tokenizer,
    local_model,
    lora_layers,
    resolve_dtype,
    revision,
    weights_digest,
)

CPU = torch.device("cpu")


def test_every_linear_layer_but_the_head_gets_the_same_frozen_adapter_every_time(tiny_model: str) -> None:
    models = [load_model(tiny_model, Lora(rank=4, seed=seed), CPU) for seed in (0, 0, 1)]
    layers = [lora_layers(model) for model in models]
    assert len(layers[0]) == 2 * 7
    assert "model.layers.0.self_attn.q_proj.lora_B" in layers[0]
    assert not any(parameter.requires_grad for parameter in models[0].parameters())
    a = [model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight") for model in models]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    assert a[0].abs().max() <= 32**-0.5
    assert not layers[0]["model.layers.0.self_attn.q_proj.lora_B"].weight.any()


def test_named_targets_alone_are_adapted(tiny_model: str) -> None:
    model = load_model(tiny_model, Lora(targets=("q_proj",)), CPU)
    assert {name.split(".")[-2] for name in lora_layers(model)} == {"q_proj"}
    with pytest.raises(UserError, match="LoRA cannot be put on"):
        load_model(tiny_model, Lora(targets=("nowhere",)), CPU)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, lambda name: load_model(name, Lora(), CPU)])
@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_a_model_that_does_not_load_is_said_in_words(load: object, name: str) -> None:
    with pytest.raises(UserError, match="could not be loaded"):
        load(name)  # type: ignore[operator]


def test_a_missing_gguf_file_is_said_in_words() -> None:
    with pytest.raises(UserError, match="there is no GGUF file"):
        local_model("/no/such/file.gguf")


def test_the_revision_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"a" * 100)
    before = revision(str(tmp_path))
    assert before == weights_digest(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"a" * 99 + b"b")
    assert revision(str(tmp_path)) != before


def test_the_type_follows_the_device() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", CPU) == torch.float16


def test_the_real_gguf_file_becomes_a_folder_that_transformers_loads(smollm2: str) -> None:
    assert smollm2.endswith(".gguf")
    folder = Path(local_model(smollm2))
    assert (folder / "model.safetensors").is_file()
    assert load_config(smollm2).num_hidden_layers == 30
    assert "<|im_start|>" in load_tokenizer(smollm2).chat_template
