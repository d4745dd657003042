from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydpp.errors import UserError
from raydpp.gradients.config import Dtype, resolve_dtype
from raydpp.gradients.model import (
    load_config,
    load_encoder,
    load_model,
    load_tokenizer,
    local_model,
    revision,
    weights_digest,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["auto", "float64", "bfloat16"])
def test_a_model_is_frozen_in_evaluation_mode_and_of_the_type_asked_for(
    dtype: Dtype, model_folder: Callable[[str], str]
) -> None:
    for model in (load_model(model_folder("gpt2"), CPU, dtype), load_encoder(model_folder("bert"), CPU, dtype)):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, resolve_dtype(dtype, "cpu"))}


def test_an_encoder_has_no_head(model_folder: Callable[[str], str]) -> None:
    assert type(load_encoder(model_folder("bert"), CPU)).__name__ == "BertModel"
    assert type(load_encoder(model_folder("llama"), CPU)).__name__ == "LlamaModel"


@pytest.mark.parametrize(
    "load", [load_config, load_tokenizer, lambda name: load_model(name, CPU), lambda name: load_encoder(name, CPU)]
)
@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_a_model_that_does_not_load_is_a_users_mistake(load: Callable[[str], Any], name: str) -> None:
    with pytest.raises(UserError, match="could not be loaded"):
        load(name)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, lambda name: load_model(name, CPU), local_model])
def test_a_missing_gguf_file_is_a_users_mistake(load: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="there is no GGUF file"):
        load("/no/such/file.gguf")


def test_the_revision_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"a" * 100)
    before = revision(str(tmp_path))
    assert before == weights_digest(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"a" * 99 + b"b")
    assert revision(str(tmp_path)) != before


def test_the_real_gguf_file_becomes_a_folder_that_transformers_loads(smollm2: str) -> None:
    assert smollm2.endswith(".gguf")
    folder = Path(local_model(smollm2))
    assert (folder / "model.safetensors").is_file()
    assert load_config(smollm2).num_hidden_layers == 30
    assert "<|im_start|>" in load_tokenizer(smollm2).chat_template
