"""Loading the model that sees the examples.

A model is named the way transformers names it (a hub name or a folder), or by the path of a GGUF file. transformers
reads GGUF slowly (minutes for large files, every time), so a GGUF file is converted once into an ordinary model
folder under the user's cache and read from there ever after.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from raydpp.errors import UserError, few
from raydpp.gradients.config import Dtype, Quantization, resolve_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn


log = logging.getLogger(__name__)


def load_model(
    name: str,
    device: torch.device,
    dtype: Dtype = "auto",
    quantization: Quantization | None = None,
    gpus: int = 1,
) -> nn.Module:
    """The frozen language model in evaluation mode on the device, or its layers on the first ``gpus`` GPUs.

    UserError where it cannot be loaded, does not fit, or lacks a weight: transformers would draw one at random.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, device, dtype, quantization, gpus)


def load_encoder(name: str, device: torch.device, dtype: Dtype = "auto", gpus: int = 1) -> nn.Module:
    """The same for a text encoder (or a language model without its head)."""
    from transformers import AutoModel

    # What pools the tokens is of no use here, and many encoders are published without it.
    model: Any = _load(AutoModel, name, device, dtype, None, gpus, needless="pooler")
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _load(
    kind: Any,
    name: str,
    device: torch.device,
    dtype: Dtype,
    quantization: Quantization | None,
    gpus: int,
    needless: str = "",
) -> nn.Module:
    import torch

    convert = f"from transformers import {kind.__name__} as M; M.from_pretrained(d).save_pretrained(d)"
    with _loading(name, "model"), no_pickles(name, convert):
        wanted = getattr(torch, resolve_dtype(dtype, device.type))
        # transformers takes SDPA (flash attention on a GPU) wherever the model has it
        load = functools.partial(
            kind.from_pretrained,
            local_model(name),
            dtype=wanted,
            quantization_config=_bitsandbytes(quantization, wanted),
            **_places(device, gpus),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        model: nn.Module
        model, found = load()
        if prefix := _stray_prefix(found["missing_keys"], found["unexpected_keys"]):
            del model  # there may be no room for two
            model, found = load(key_mapping={f"^{re.escape(prefix)}": ""})
            log.warning("the weights of %r are stored under %s...: this prefix was left out", name, prefix)
        _require_all_weights(name, found, needless)
        if gpus > 1 and {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
            raise MemoryError
    layers: Any = model.modules()
    for layer in layers:  # bitsandbytes packs 4-bit weights for some CPUs in a form without a backward pass
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


_FILLED = 0.9  # of a GPU's free memory by weights, at most: the rest is for what they compute


def _places(device: torch.device, gpus: int) -> dict[str, Any]:
    """Where transformers is to put the weights; what has no place among several GPUs it leaves on disk."""
    import torch

    if gpus == 1:
        return {"device_map": {"": device}}
    if (seen := torch.cuda.device_count()) < gpus:
        raise UserError(
            f"one model is to be spread over {gpus} GPUs, and this process sees {seen}: give a lower --gpus-per-actor,"
            " or run where there are as many"
        )
    free = {number: int(_FILLED * torch.cuda.mem_get_info(number)[0]) for number in range(gpus)}
    return {"device_map": "balanced", "max_memory": free}


def _bitsandbytes(quantization: Quantization | None, dtype: torch.dtype) -> Any:
    """transformers' configuration of a quantization; None for none, or for the checkpoint's own."""
    # would say of every layer in every batch that it rounds its inputs, too
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # A threshold would leave whole columns of the inputs unrounded, wherever one token of the batch is large in
        # them: an example's features would move with its neighbours by as much as the rounding moves them.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_quantization(name: str, dtype: Dtype) -> None:
    """UserError where --quantization cannot be had for a model of this name and type, whatever its weights are."""
    if dtype == "float64":
        raise UserError("--quantization and --dtype float64: rounded weights compute in float32 or shorter types")
    if name.endswith(".gguf"):
        raise UserError(
            f"--quantization would round the weights of {name} a second time: give the model itself, or leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--quantization needs bitsandbytes, which is not installed here: pip install bitsandbytes, on every machine"
            " of the cluster"
        )


def require_plain_weights(name: str, config: Any) -> None:
    """UserError where a model's weights were saved as quantised ones: --quantization would change nothing."""
    if getattr(config, "quantization_config", None):
        raise UserError(f"--quantization: the weights of {name!r} are quantised already; leave it out to use them so")


def _stray_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """What stands before the names of the weights in a checkpoint of a wrapped model (``_orig_mod.``, ``module.``)."""
    wanted = set(missing)
    prefixes = Counter(
        stored[: dot.end()]
        for stored in unexpected
        for dot in re.finditer(r"\.", stored)
        if stored[dot.end() :] in wanted
    )
    return max(prefixes, key=prefixes.__getitem__, default=None)


def _require_all_weights(name: str, found: Mapping[str, Any], needless: str) -> None:
    """UserError where a checkpoint does not fill its model; what it has beyond that is said."""
    missing = sorted(key for key in found["missing_keys"] if not (needless and needless in key))
    other = sorted(found["mismatched_keys"])
    if other:
        key, stored, wanted = other[0]
        raise UserError(
            f"the model {name!r} has {len(other)} weights of another shape than its configuration says"
            f" ({key} is {tuple(stored)}, not {tuple(wanted)}): its config.json belongs to another checkpoint"
        )
    if missing:
        head = "lm_head" in missing[0] or "embed_out" in missing[0]
        raise UserError(
            f"the checkpoint {name!r} does not hold {len(missing)} weights of its model ({few(missing)}), which would"
            " be drawn at random: "
            + (
                "it was saved without its head; save the language model itself"
                if head and len(missing) == 1
                else "save the model again with save_pretrained, an adapter merged or given with --adapter"
            )
        )
    if (left := sorted(found["unexpected_keys"])) and not needless:
        log.warning(
            "%d weights of %r belong to no part of the model, and were left out: %s", len(left), name, few(left)
        )


def load_tokenizer(name: str) -> Any:
    """The model's fast tokenizer. UserError where there is none."""
    from transformers import AutoTokenizer

    with _loading(name, "tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(local_model(name), trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name!r} is a slow one, without character offsets: response tokens cannot be"
            " distinguished from prompt tokens. Use a model with a fast tokenizer (tokenizer.json)"
        )
    return tokenizer


def load_config(name: str) -> Any:
    """The model's configuration: cheap, loads no weights. UserError where there is none."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{name!r} is an adapter: give the model that it was trained for, and this as --adapter")
    with _loading(name, "model"):
        # Not None, for which transformers asks at the terminal whether a model's own code may run.
        config = AutoConfig.from_pretrained(local_model(name), trust_remote_code=False)
    return config


def vocabulary_size(name: str) -> int | None:
    """How many tokens the model has embeddings for; None where its configuration does not say."""
    return getattr(load_config(name).get_text_config(), "vocab_size", None)


def hidden_width(config: Any) -> int:
    """How many numbers the last hidden state of a token has."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)  # OPT-350m projects it


_COUNTED_FROM_PADDING = ("roberta", "camembert", "data2vec-text", "longformer", "mpnet", "esm", "ibert", "markuplm")


def longest_input(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model takes, and its rotations stay the same for; None where nobody says.

    RoBERTa and its like number positions from behind the padding token's id, so that their tables hold fewer than they
    have rows. With LongRoPE one token beyond the original window turns every token of the batch by other angles.
    """
    text = config.get_text_config()
    table = getattr(text, "max_position_embeddings", None)
    if table and any(kind in text.model_type for kind in _COUNTED_FROM_PADDING):
        table -= (text.pad_token_id or 0) + 1
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    original = None
    if rope.get("rope_type", rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings") or text.original_max_position_embeddings
    return min(
        (int(limit) for limit in (table, original, tokenizer.model_max_length) if limit and limit > 0), default=None
    )


@contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """Without transformers' progress bars and advice, which would mix with the job's own; any error is a UserError."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for a bad name
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "offload" in str(error):
            raise UserError(
                f"the {what} {name!r} does not fit into memory: raydpp extract spreads a model over more GPUs with"
                " --gpus-per-actor, and rounds its weights with --quantization"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the {what} {name!r} could not be loaded: {reason}. Give a Hugging Face name that this machine can"
            " reach, a folder written by save_pretrained, or a .gguf file"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def no_pickles(name: str, convert: str) -> Iterator[None]:
    """UserError where a model or an adapter has its weights as pickles alone, which can hold code: torch reads none.

    Args:
        name: A folder or a Hugging Face name.
        convert: Python that writes them as safetensors into the folder d.
    """
    folder = name if Path(name).expanduser().exists() else name.rpartition("/")[2]
    fetch = "" if folder == name else f"hf download {shlex.quote(name)} --local-dir {shlex.quote(folder)} && "
    command = f"{fetch}python -c {shlex.quote(f'd = {json.dumps(folder)}; {convert}')}"
    refused = UserError(
        f"the weights of {name!r} are pickles (.bin), which can run code, and are not read; if you trust who wrote"
        f" them, convert them into safetensors, once: {command}" + (f", and give {folder}" if fetch else "")
    )
    with mock.patch("torch.load", side_effect=refused):
        yield


def revision(name: str) -> str:
    """What exactly the name stood for: a hub commit, or a local model's hash."""
    if Path(name).expanduser().exists():
        return weights_digest(name)
    return str(getattr(load_config(name), "_commit_hash", None) or "unknown")


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


def cache_folder() -> Path:
    """Where converted models are kept: RAYDPP_CACHE, else XDG_CACHE_HOME/raydpp, else ~/.cache/raydpp."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAYDPP_CACHE") or Path(base) / "raydpp")


def _convert_gguf(source: Path, target: Path) -> None:
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}  # files beside it may ask for it
    # Configuration, tokenizer and weights each parse the whole vocabulary, which takes most of the time: once will do.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        config = AutoConfig.from_pretrained(source.parent, **options)
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(target)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    weights, found = loaded
    _require_all_weights(str(source), found, needless="")
    # The loaded model calls itself quantised and will not be saved, though its weights are plain by now.
    plain.load_state_dict(weights.state_dict(), assign=True)
    plain.save_pretrained(target)
