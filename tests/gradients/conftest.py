"""Models of a few thousand random weights, one of every architecture, and adapters that PEFT saved for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydpp.gradients.tokenization import TokenizedExample

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """From the name of an architecture to the folder of a model in float32; no weight or bias is left at 0 or 1."""
    import transformers as t

    marks: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2: dict[str, Any] = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24}
    known: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=1)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, num_key_value_heads=1)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES)),  # its head has a bias
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
        ),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, num_key_value_heads=1, logits_scaling=3.0)),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES, num_key_value_heads=1, logit_scale=0.3, **marks)),
        "bert": lambda: t.BertModel(t.BertConfig(**SIZES)),
    }

    @functools.cache
    def made(architecture: str) -> str:
        torch.manual_seed(0)
        model = known[architecture]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = str(tmp_path_factory.mktemp(architecture))
        model.save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """transformers' own way to load a folder, in float64 and evaluation mode."""
    from transformers import AutoModelForCausalLM

    def loaded(folder: str, dtype: torch.dtype = torch.float64) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return loaded


@pytest.fixture
def saved_adapter(load: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """From a model's folder and LoraConfig's arguments to the folder of an adapter with random A and B."""
    from peft import LoraConfig, get_peft_model

    def saved(folder: str, **options: Any) -> str:
        torch.manual_seed(1)
        given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear"}
        config = LoraConfig(**{**given, "init_lora_weights": False, **options})
        out = str(tmp_path / "adapter")
        get_peft_model(load(folder, torch.float32), config).save_pretrained(out)
        return out

    return saved


@pytest.fixture(scope="session")
def examples() -> Callable[..., list[TokenizedExample]]:
    """From lengths to examples of random tokens whose second half is the response."""

    def made(*lengths: int) -> list[TokenizedExample]:
        draw = np.random.default_rng(lengths)
        return [
            TokenizedExample(draw.integers(3, 60, n).astype(np.int32), np.arange(n) >= n // 2, False) for n in lengths
        ]

    return made


@pytest.fixture(scope="session")
def loss_alone() -> Callable[[Any, TokenizedExample], torch.Tensor]:
    """The mean cross-entropy of one example's response tokens, from the model's own logits."""

    def loss(model: Any, example: TokenizedExample) -> torch.Tensor:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]  # (s - 1, V)
        counts = torch.from_numpy(example.response[1:])
        return torch.nn.functional.cross_entropy(logits[counts], ids[1:][counts])

    return loss
