"""The laws of extraction on a GPU, with random weights of real widths, and one model over several GPUs.

``pytest -m gpu`` runs them and nothing else; without a GPU they are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydpp.errors import UserError
from raydpp.gradients.config import Adapter, Dtype, ExtractorConfig, Quantization, Representation
from raydpp.gradients.representations import Extractor, load_extractor
from raydpp.gradients.tokenization import TokenizedExample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
Build = Callable[..., Any]

SIZES: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
REPRESENTATIONS: list[Representation] = ["gradient", "hidden", "weighted-hidden"]
LENGTHS = (8, 200, 31, 77, 500, 16, 120, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of 18 million random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products are not rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, D) unit rows twice -> (n,)."""
    return np.asarray((one.astype(np.float64) * other).sum(1))


def features(extractor: Extractor, given: list[TokenizedExample]) -> np.ndarray:
    found = extractor(given)
    assert found.reasons == [None] * len(given)
    return found.features


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_in_float32_a_gpu_agrees_with_the_cpu_and_with_itself(
    representation: Representation, model: str, examples: Build
) -> None:
    config = ExtractorConfig(model, representation, dimension=2048, dtype="float32", batch_tokens=2048, difficulty=True)
    given = examples(*LENGTHS)
    on_cpu, extractor = load_extractor(config)(given), load_extractor(config, "cuda")
    on_gpu, again = extractor(given), extractor(given)
    assert cosines(on_cpu.features, on_gpu.features).min() > 1 - 1e-5
    np.testing.assert_allclose(on_gpu.norms, on_cpu.norms, rtol=1e-3)
    np.testing.assert_allclose(on_gpu.losses, on_cpu.losses, rtol=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(on_gpu.difficulties, on_cpu.difficulties, rtol=1e-4)  # type: ignore[arg-type]
    assert cosines(on_gpu.features, again.features).min() > 1 - 1e-6


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.05)])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_neighbours_padding_and_order_change_no_feature(
    representation: Representation, dtype: Dtype, error: float, model: str, examples: Build
) -> None:
    config = ExtractorConfig(model, representation, dimension=2048, dtype=dtype, batch_tokens=8 * 500)
    extractor, given = load_extractor(config, "cuda"), examples(*LENGTHS)
    together = features(extractor, given)
    alone = np.concatenate([features(extractor, [one]) for one in given])
    backwards = features(extractor, given[::-1])[::-1]
    extractor.batches.budget = 200
    small = features(extractor, given)
    for other in (alone, backwards, small):
        assert np.linalg.norm(together - other, axis=1).max() < error
    assert np.linalg.norm(together[:1] - together[1:], axis=1).min() > 2 * error  # another example's is further


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_bfloat16_is_near_float32(representation: Representation, model: str, examples: Build) -> None:
    config = ExtractorConfig(model, representation, dimension=2048)  # bfloat16 on a GPU
    extractor: Any = load_extractor(config, "cuda")
    assert next(extractor.model.parameters()).dtype == torch.bfloat16
    exact = load_extractor(replace(config, dtype="float32"))
    given = examples(*LENGTHS)
    assert cosines(features(extractor, given), features(exact, given)).min() > 0.98


def test_a_budget_beyond_memory_is_halved_until_every_example_has_its_feature(model: str, examples: Build) -> None:
    config = ExtractorConfig(model, dimension=2048, dtype="float32", batch_tokens=2**20)
    extractor, given = load_extractor(config, "cuda"), examples(*[400] * 256)
    expected = features(load_extractor(replace(config, batch_tokens=4000), "cuda"), given)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 3 * 2**28  # 256 x 400 positions need some twenty times as much
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    try:
        found = features(extractor, given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert extractor.batches.budget < 256 * 400
    assert np.linalg.norm(found - expected, axis=1).max() < 1e-3


def test_no_example_leaves_memory_behind(model: str, examples: Build) -> None:
    extractor = load_extractor(ExtractorConfig(model, dimension=2048, batch_tokens=4000), "cuda")
    given = examples(*LENGTHS)
    features(extractor, given)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        features(extractor, given)
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize(("quantization", "cosine"), [("8bit", 0.9), ("4bit", 0.5)])
@pytest.mark.parametrize("representation", ["gradient", "hidden"])
def test_rounded_weights_take_less_memory_and_give_features_near_the_plain_ones(
    representation: Representation, quantization: Quantization, cosine: float, model: str, examples: Build
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config, given = ExtractorConfig(model, representation, dimension=2048, batch_tokens=4000), examples(*LENGTHS)
    expected = features(load_extractor(config, "cuda"), given)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    plain: Any = load_extractor(config, "cuda")
    whole = torch.cuda.memory_allocated() - before
    del plain
    before = torch.cuda.memory_allocated()
    extractor = load_extractor(replace(config, quantization=quantization), "cuda")
    assert torch.cuda.memory_allocated() - before < 0.9 * whole
    found = features(extractor, given)
    assert cosines(found, expected).min() > cosine
    alone = np.concatenate([features(extractor, [one]) for one in given])
    assert np.median(np.linalg.norm(found - alone, axis=1)) < 0.1


@two_gpus
@pytest.mark.parametrize("kind", ["fresh", "trained"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_model_over_two_gpus_is_the_model_on_one(
    representation: Representation, kind: str, model: str, saved_adapter: Build, examples: Build
) -> None:
    adapter = Adapter(saved_adapter(model) if kind == "trained" else kind)
    config = ExtractorConfig(
        model, representation, adapter, dimension=2048, dtype="float32", batch_tokens=4000, difficulty=True
    )
    given = examples(*LENGTHS)
    one, extractor = load_extractor(config, "cuda")(given), load_extractor(config, "cuda", gpus=2)
    places = {parameter.device for parameter in extractor.model.parameters()}
    assert places == {torch.device("cuda", 0), torch.device("cuda", 1)}
    if representation == "gradient":
        maps = [m for m in extractor.projection.maps.values() if m is not None]  # type: ignore[attr-defined]
        assert {numbers.device for numbers in maps} == places
    two = extractor(given)
    assert two.reasons == [None] * len(given)
    assert cosines(one.features, two.features).min() > 1 - 1e-5
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(two.difficulties, one.difficulties, rtol=1e-4)  # type: ignore[arg-type]


@two_gpus
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_rounded_weights_are_spread_too(quantization: Quantization, model: str, examples: Build) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config = ExtractorConfig(model, dimension=2048, batch_tokens=4000, quantization=quantization)
    given = examples(*LENGTHS)
    one, extractor = features(load_extractor(config, "cuda"), given), load_extractor(config, "cuda", gpus=2)
    assert len({parameter.device for parameter in extractor.model.parameters()}) == 2
    assert np.median(cosines(one, features(extractor, given))) > 0.99


@two_gpus
def test_a_model_larger_than_its_gpus_is_refused_in_a_sentence(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number=None: (12 * 2**20, 80 * 2**30))
    with pytest.raises(UserError, match="does not fit into memory"):
        load_extractor(ExtractorConfig(model, dimension=2048), "cuda", gpus=2)


def test_more_gpus_than_there_are_are_refused(model: str) -> None:
    with pytest.raises(UserError, match=f"and this process sees {torch.cuda.device_count()}"):
        load_extractor(ExtractorConfig(model), "cuda", gpus=torch.cuda.device_count() + 1)


@pytest.fixture
def words(model: str, tiny_model: str, tmp_path: Path) -> str:
    """The model with the tokenizer of the tiny one."""
    folder = Path(shutil.copytree(model, tmp_path / "words"))
    for file in Path(tiny_model).iterdir():
        if file.suffix in (".json", ".jinja") and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return str(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("gpus", [0.5, 1, pytest.param(2, marks=two_gpus)])
def test_the_job_gives_an_actor_its_gpus(gpus: float, corpus: str, words: str, tmp_path: Path) -> None:
    arguments = ["extract", corpus, "--out", str(tmp_path / "out"), "--model", words, "--dimension", "256"]
    arguments += ["--gpus-per-actor", f"{gpus:g}", "--actors", "1"]
    done = subprocess.run([sys.executable, "-m", "raydpp.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["plan"]["gpus"] == gpus
    assert record["counts"]["rows"] == 40
    assert record["fingerprint"]["dtype"] == "bfloat16"
