"""Loading the language model whose gradients describe the examples, and giving it LoRA adapters.

A model is named the way transformers names it (a hub name or a folder), or by the path of a GGUF file. transformers
reads GGUF slowly (minutes for large files, every time), so a GGUF file is converted once into an ordinary model
folder under the user's cache and read from there ever after.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn

from raydpp.errors import UserError
from raydpp.gradients.projection import derived_generator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Lora:
    """The LoRA adapter whose gradients are taken (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: r, the inner dimension of each adapter.
        targets: "all-linear", or the module names (suffixes) that PEFT should adapt.
        seed: Seeds the A matrices; each also depends on its module's name.
    """

    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    seed: int = 0


def cache_folder() -> Path:
    """Where converted models are kept: RAYDPP_CACHE, else XDG_CACHE_HOME/raydpp, else ~/.cache/raydpp."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAYDPP_CACHE") or Path(base) / "raydpp")


def local_model(name: str) -> str:
    """The name to load: a GGUF file's converted folder (converted now if need be), anything else as it is."""
    if not name.endswith(".gguf"):
        return name
    source = Path(name).expanduser()
    if not source.is_file():
        raise UserError(f"there is no GGUF file {name}")
    target = cache_folder() / "gguf" / f"{source.stem}-{weights_digest(str(source))[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
        try:
            _convert_gguf(source, staging)
            try:
                staging.rename(target)  # whole or not at all; another process may have been faster
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return str(target)


def _convert_gguf(source: Path, target: Path) -> None:
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name}
    # Configuration, tokenizer and weights each parse the whole vocabulary, which takes most of the time: once will do.
    with _quiet_transformers(), mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        config = AutoConfig.from_pretrained(source.parent, **options)
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(target)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        weights = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=torch.float32, **options)
    # The loaded model calls itself quantised and will not be saved, though its weights are plain by now.
    plain.load_state_dict(weights.state_dict(), assign=True)
    plain.save_pretrained(target)


def weights_digest(path: str) -> str:
    """A hash of a local model: names, sizes, and the first and last MiB of every file (hex).

    Reading all of a large model would cost minutes; weights that differ nowhere in these places do not occur.
    """
    root = Path(path).expanduser()
    digest = hashlib.blake2b(digest_size=16)
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read(2**20))
    return digest.hexdigest()


def _quiet_transformers() -> Any:
    """A context without transformers' progress bars and advice: they would interleave with the job's own."""
    from contextlib import contextmanager

    from transformers.utils import logging

    @contextmanager
    def quiet() -> Any:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()

    return quiet()


def _explained(name: str, what: str, error: Exception) -> UserError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"the {what} {name!r} could not be loaded: {first_line.rstrip('.')}. Give a Hugging Face name that this machine"
        " can reach, a folder written by save_pretrained, or a .gguf file"
    )


def load_tokenizer(name: str) -> Any:
    """The model's fast tokenizer. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(local_model(name))
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for a bad name
        raise _explained(name, "tokenizer of", error) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name!r} is a slow one, without character offsets: response tokens cannot be told"
            " from prompt tokens. Use a model with a fast tokenizer (tokenizer.json)"
        )
    return tokenizer


def load_config(name: str) -> Any:
    """The model's configuration: cheap, loads no weights. Raises UserError where there is none."""
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(local_model(name))
    except UserError:
        raise
    except Exception as error:
        raise _explained(name, "model", error) from error


def revision(name: str) -> str:
    """What exactly the name stood for: a hub commit, or a local model's hash."""
    if Path(name).expanduser().exists():
        return weights_digest(name)
    return str(getattr(load_config(name), "_commit_hash", None) or "unknown")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """float32 on a CPU and bfloat16 on a GPU where "auto"; else as named."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_model(name: str, lora: Lora, device: torch.device, dtype: Dtype = "auto") -> nn.Module:
    """The frozen model in evaluation mode, with LoRA adapters, on the device. Raises UserError with words."""
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                local_model(name), dtype=resolve_dtype(dtype, device), attn_implementation="sdpa"
            )
    except UserError:
        raise
    except Exception as error:
        raise _explained(name, "model", error) from error
    return with_lora(model, lora).to(device)


def with_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """The model with fresh LoRA adapters, every parameter frozen, in evaluation mode.

    B is zero, as LoRA starts. A is uniform in +-1/sqrt(inputs), PEFT's own distribution, but drawn from a generator
    that depends only on the seed and the module's name, so that every actor has the same A.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank, lora_dropout=0.0, target_modules=targets)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA cannot be put on {targets!r} of this model: {error}") from error
    for name, module in adapted.named_modules():
        if name.endswith(".lora_A.default"):
            bound = 1 / math.sqrt(module.in_features)
            draw = derived_generator(lora.seed, layer_name(name), "lora_A")
            values = draw.uniform(-bound, bound, size=(lora.rank, module.in_features)).astype(np.float32)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(values))
    return adapted.requires_grad_(False).eval()


def layer_name(name: str) -> str:
    """A PEFT module's name without PEFT's own prefix and adapter name: model.layers.0.self_attn.q_proj.lora_B."""
    return name.removeprefix("base_model.model.").removesuffix(".default")


def lora_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose gradients count, by name: the B side of every adapter.

    With fresh adapters B = 0, and the gradient of A, being B^T times something, is exactly zero; B's is the full
    weight's gradient times A^T.
    """
    return {
        layer_name(name): module
        for name, module in model.named_modules()
        if name.endswith(".lora_B.default") and isinstance(module, nn.Linear)
    }
