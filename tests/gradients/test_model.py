from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydpp.errors import UserError
from raydpp.gradients.config import Dtype, Quantization, resolve_dtype
from raydpp.gradients.model import (
    check_quantization,
    hidden_width,
    load_config,
    load_encoder,
    load_model,
    load_tokenizer,
    local_model,
    longest_input,
    no_pickles,
    revision,
    vocabulary_size,
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


def rewritten(source: str, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    """A copy of a model's folder with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_of_all_weights_is_left_out_and_said(
    prefix: str, architecture: str, model_folder: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = model_folder(architecture)
    wrapped = rewritten(source, tmp_path / "m", lambda weights: {prefix + key: w for key, w in weights.items()})
    expected, found = load_model(source, CPU), load_model(wrapped, CPU)
    for (name, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert f"are stored under {prefix}..." in caplog.text


@pytest.mark.parametrize(
    ("dropped", "reason"),
    [
        ("lm_head.weight", r"does not hold 1 weights of its model \(lm_head.weight\).*saved without its head"),
        ("model.layers.1.mlp.up_proj.weight", r"does not hold 1 weights .*up_proj.*save the model again"),
        ("layers.0", r"does not hold 9 weights of its model \(model\.layers\.0\..*, \.\.\.\), which would be drawn"),
    ],
)
def test_a_checkpoint_without_all_of_its_weights_is_refused(
    dropped: str, reason: str, model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    folder = rewritten(
        model_folder("llama"), tmp_path / "m", lambda weights: {k: w for k, w in weights.items() if dropped not in k}
    )
    with pytest.raises(UserError, match=reason):
        load_model(folder, CPU)


def test_a_checkpoint_of_another_shape_is_refused(model_folder: Callable[[str], str], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewritten(model_folder("llama"), tmp_path / "m", lambda weights: weights | {name: torch.zeros(20, 16)})
    with pytest.raises(UserError, match=rf"1 weights of another shape .*{name} is \(20, 16\), not \(24, 16\)"):
        load_model(folder, CPU)


def test_weights_that_are_left_over_are_said(
    model_folder: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"value_head.weight": torch.zeros(1, 16), "x.y": torch.zeros(1)}
    load_model(rewritten(model_folder("llama"), tmp_path / "m", lambda weights: weights | more), CPU)
    assert "2 weights of" in caplog.text
    assert "value_head.weight, x.y" in caplog.text


def test_an_encoder_needs_no_pooler_and_uses_no_head(model_folder: Callable[[str], str], tmp_path: Path) -> None:
    folder = rewritten(
        model_folder("bert"), tmp_path / "m", lambda weights: {k: w for k, w in weights.items() if "pooler" not in k}
    )
    load_encoder(folder, CPU)
    broken = rewritten(
        model_folder("bert"), tmp_path / "b", lambda weights: {k: w for k, w in weights.items() if "layer.1" not in k}
    )
    with pytest.raises(UserError, match="does not hold 16 weights of its model"):
        load_encoder(broken, CPU)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What transformers is asked for: a model whose blocks it leaves on disk, where there is a map to memory."""
    import transformers

    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        given.update(options)
        model: Any = torch.nn.Linear(2, 2)
        if "max_memory" in options:
            model.hf_device_map = {"layers.0": 0, "layers.1": "disk"}
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return given


def test_a_model_is_spread_over_the_free_memory_of_its_gpus_and_refused_where_it_is_too_large(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("m", torch.device("cuda"))
    assert asked["device_map"] == {"": torch.device("cuda")}
    assert "max_memory" not in asked
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1000 * (number + 1), 9999))
    with pytest.raises(UserError, match=r"'m' does not fit into memory: .* --gpus-per-actor"):
        load_model("m", torch.device("cuda"), gpus=2)
    assert asked["device_map"] == "balanced"
    assert asked["max_memory"] == {0: 900, 1: 1800}
    with pytest.raises(UserError, match="spread over 4 GPUs, and this process sees 3"):
        load_model("m", torch.device("cuda"), gpus=4)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ValueError("provide an `offload_folder` for")],
)
def test_a_model_that_is_too_large_is_no_wrong_name(
    error: Exception, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(UserError, match="does not fit into memory"):
        load_model(model_folder("llama"), CPU)


def test_a_quantization_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UserError, match="needs bitsandbytes, which is not installed here: pip install bitsandbytes"):
        check_quantization("m", "auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_quantization("m", "bfloat16")
    with pytest.raises(UserError, match="float64"):
        check_quantization("m", "float64")
    with pytest.raises(UserError, match=r"a\.gguf a second time"):
        check_quantization("a.gguf", "auto")


@pytest.mark.parametrize(("quantization", "kind"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_but_the_head_are_rounded(
    quantization: Quantization, kind: str, dtype: Dtype, tiny_model: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    model: Any = load_model(tiny_model, CPU, dtype, quantization)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds.pop("lm_head") == "Linear"
    assert len(kinds) == 14
    assert set(kinds.values()) == {kind}
    plain: Any = load_model(tiny_model, CPU, dtype)
    ids = torch.arange(3, 15)[None]
    found, exact = (one(input_ids=ids).logits.float() for one in (model, plain))
    assert 0 < (found - exact).norm() < {"8bit": 0.1, "4bit": 0.5}[quantization] * exact.norm()


def test_an_adapter_is_no_model(saved_adapter: Callable[..., str], model_folder: Callable[[str], str]) -> None:
    folder = saved_adapter(model_folder("llama"))
    with pytest.raises(UserError, match="is an adapter: give the model that it was trained for, and this as --adapter"):
        load_config(folder)


def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(
    model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    names = {name: f"own.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    for load in (load_config, load_tokenizer, lambda name: load_model(name, CPU), lambda name: load_encoder(name, CPU)):
        with pytest.raises(UserError, match=r"could not be loaded: .*custom code") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def pickled(source: str, target: Path, **settings: str) -> str:
    """A copy of a model's folder whose weights are a pickle, as older ones are."""
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    torch.save(weights, target / settings.get("transformers_weights", "pytorch_model.bin"))
    (target / "model.safetensors").unlink()
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    return str(target)


@pytest.mark.parametrize(("architecture", "load"), [("llama", load_model), ("bert", load_encoder)])
def test_weights_that_are_pickles_alone_are_refused_with_the_command_that_converts_them(
    architecture: str, load: Callable[..., Any], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    folder = pickled(model_folder(architecture), tmp_path / "it's a $model")
    with pytest.raises(UserError, match=r"are pickles \(.bin\), which can run code, and are not read") as caught:
        load(folder, CPU)
    python, flag, code = shlex.split(str(caught.value).partition("once: ")[2])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    expected, found = load(model_folder(architecture), CPU), load(folder, CPU)
    assert all(torch.equal(one, other) for one, other in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_configuration_cannot_ask_for_a_pickle(model_folder: Callable[[str], str], tmp_path: Path) -> None:
    folder = pickled(model_folder("llama"), tmp_path / "m", transformers_weights="adapter_model.bin")
    with pytest.raises(UserError, match="are pickles"):
        load_model(folder, CPU)


def test_of_a_name_the_command_fetches_the_files_first() -> None:
    said = r"once: hf download org/m --local-dir m && python -c 'd = \"m\"; c', and give m$"
    with pytest.raises(UserError, match=said), no_pickles("org/m", "c"):
        torch.load("m")


def test_the_vocabulary_is_that_of_the_text_model(model_folder: Callable[[str], str]) -> None:
    assert vocabulary_size(model_folder("llama")) == 64
    assert vocabulary_size(model_folder("bert")) == 64


def test_of_an_encoder_decoder_the_encoder_is_taken(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    encoder: Any = load_encoder(str(tmp_path), CPU)
    assert encoder(input_ids=torch.arange(8)[None]).last_hidden_state.shape == (1, 8, 16)


class Tokenizer:
    """Of which only this is asked; a very large number where a tokenizer knows no limit."""

    def __init__(self, model_max_length: int = 10**30) -> None:
        self.model_max_length = model_max_length


ROPE: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "options", "tokenizer", "longest"),
    [
        ("Llama", {"max_position_embeddings": 4096}, Tokenizer(), 4096),
        ("Llama", {"max_position_embeddings": 4096}, Tokenizer(1000), 1000),
        ("Roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, Tokenizer(), 512),
        ("XLMRoberta", {"max_position_embeddings": 514, "pad_token_id": 1}, Tokenizer(), 512),
        ("MPNet", {"max_position_embeddings": 514, "pad_token_id": 1}, Tokenizer(), 512),
        ("Bert", {"max_position_embeddings": 512}, Tokenizer(), 512),
        (
            "Phi3",
            {
                "hidden_size": 16,
                "num_attention_heads": 2,
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": ROPE,
                "pad_token_id": 0,
            },
            Tokenizer(),
            4096,
        ),
        ("XLNet", {}, Tokenizer(0), None),
    ],
)
def test_the_longest_input_is_what_the_model_can_take(
    kind: str, options: dict[str, Any], tokenizer: Any, longest: int | None
) -> None:
    import transformers

    found = longest_input(getattr(transformers, f"{kind}Config")(**options), tokenizer)
    assert found == longest


def test_the_width_is_that_of_the_last_hidden_state() -> None:
    import transformers

    assert hidden_width(transformers.LlamaConfig(hidden_size=48, num_attention_heads=4)) == 48
    assert hidden_width(transformers.OPTConfig(hidden_size=48, num_attention_heads=4, word_embed_proj_dim=16)) == 16
    assert hidden_width(transformers.Gemma3Config(text_config={"hidden_size": 24, "num_attention_heads": 4})) == 24
