"""Every family of language models that transformers has, with a few thousand random weights each.

``python tests/benchmarks/families.py``: extract's features of two padded examples beside those that plain autograd
gives for each example alone (the largest relative difference, in float32), or the sentence that refuses the family.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import TimeoutError, get_context
from typing import Any

import numpy as np
import torch
from printed import machine, table
from tqdm import tqdm

from raydpp.errors import UserError
from raydpp.gradients.config import Adapter, ExtractorConfig
from raydpp.gradients.representations import load_extractor
from raydpp.gradients.tokenization import TokenizedExample

DIMENSION, RANK = 512, 16
MOST_WEIGHTS = 20_000_000  # what is larger was not made small by SIZES
SECONDS = 120
TOLERANCE = 1e-3  # relative, in float32
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "num_heads": 4,
    "state_size": 8,
    "time_step_rank": 4,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "plbart": {"d_model": 32},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xlnet": {"d_head": 8},
}


@dataclass(frozen=True)
class Found:
    """What became of a family: ``right``, ``wrong``, ``refused`` or ``not built``, and why or how far off."""

    family: str
    outcome: str
    detail: str


def small_model(family: str) -> Any:
    """A model of the family with random weights. ValueError where it does not get small."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **_overrides(plain))
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    if weights > MOST_WEIGHTS:
        raise ValueError(f"still has {weights:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # none is left at 0 or 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _overrides(config: Any) -> dict[str, Any]:
    known = {*config.to_dict(), *(getattr(config, "attribute_map", None) or {})}
    found: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in found:  # multi-head latent attention
        found.pop("head_dim", None)
        found["num_key_value_heads"] = found["num_attention_heads"]
    found |= EXCEPTIONS.get(config.model_type, {})
    for name, part in vars(config).items():
        if name.endswith("_config") and hasattr(part, "to_dict"):
            found[name] = _overrides(part)
    return found


def by_autograd(extractor: Any, model: torch.nn.Module, example: TokenizedExample) -> np.ndarray:
    """(D,): the weights' own gradients, without hooks, batches or padding, through the same projection."""
    ids = torch.from_numpy(example.ids.astype(np.int64))
    weights = [model.get_parameter(f"{layer.name}.weight") for layer in extractor.target_layers]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # (s - 1, V)
    counts = torch.from_numpy(example.response[1:])
    loss = torch.nn.functional.cross_entropy(logits[counts], ids[1:][counts])
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    total = torch.zeros(1, DIMENSION)
    for layer, gradient in zip(extractor.target_layers, gradients, strict=True):
        whole = gradient.T if type(layer.module).__name__ == "Conv1D" else gradient  # (outputs, inputs)
        # A sum over outputs o, of its row times the unit vector e_o: what the projection takes positions for.
        reduced = extractor.projection.reduce_inputs(layer.name, whole[None])
        extractor.projection.add_layer(total, layer.name, reduced, torch.eye(len(whole))[None])
    return total[0].numpy()


def examine(family: str) -> Found:
    """One family, as extract would take it; where its experts would be missed, the layers that are not experts'."""
    from transformers import AutoModelForCausalLM

    draw = np.random.default_rng(0)
    examples = [TokenizedExample(draw.integers(3, 120, n).astype(np.int32), np.arange(n) >= 5, False) for n in (17, 11)]
    named = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            small_model(family).save_pretrained(folder)
        except Exception as error:
            return Found(family, "not built", _words(error))
        try:
            try:
                extractor = _extractor(folder, "all")
            except UserError as error:
                if "fused experts" not in str(error):
                    raise
                named = _words(error).partition(" of the weights")[0]
                extractor = _extractor(folder, ".")
        except UserError as error:
            raised = "cannot be used for" in str(error)  # by the model's own code: its small sizes do not fit together
            return Found(family, "not built" if raised else "refused", _words(error, folder))
        alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        found = extractor(examples)
        if any(found.reasons):
            return Found(family, "wrong", str(found.reasons))
        expected = np.stack([by_autograd(extractor, alone, example) for example in examples])
    got = found.features * found.norms[:, None]
    off = float((np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())
    outcome = "wrong" if off > TOLERANCE else "experts" if named else "right"
    return Found(family, outcome, f"{off:.0e}" + (f", without fused experts ({named} of the weights)" if named else ""))


def _extractor(folder: str, layers: str) -> Any:
    config = ExtractorConfig(
        folder, adapter=Adapter(layers=layers), dimension=DIMENSION, rank=RANK, dtype="float32", batch_tokens=64
    )
    return load_extractor(config)


def _words(error: Exception, folder: str = "\0") -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(folder, "model")[:160]


def _quietly(family: str) -> Found:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    try:
        return examine(family)
    except Exception as error:
        return Found(family, "wrong", f"{type(error).__name__}: {_words(error)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every family and the counts of outcomes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types of transformers (all)")
    families = parser.parse_args(arguments).families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    print(machine("torch", "transformers"), "\n")
    found = []
    with get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        waiting = [(family, pool.apply_async(_quietly, (family,))) for family in families]
        for family, result in tqdm(waiting, unit="family"):
            try:
                found.append(result.get(SECONDS))
            except TimeoutError:
                found.append(Found(family, "not built", f"took more than {SECONDS} s"))
        pool.terminate()
    table(["family", "", ""], [[one.family, one.outcome, one.detail] for one in found])
    print(", ".join(f"{outcome}: {count}" for outcome, count in Counter(one.outcome for one in found).most_common()))


if __name__ == "__main__":
    main()
