from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raydpp.cli import main
from raydpp.errors import UserError
from raydpp.gradients.optimizer import learning_rate
from raydpp.runs import RunResult
from raydpp.warmup.stage import warmup
from tests.faults import refusing

FEW: dict[str, Any] = {"limit": 12, "epochs": 3, "lora_rank": 4, "batch_size": 4, "learning_rate": 0.01}  # warmed_up's


def test_an_adapter_is_trained_with_a_checkpoint_an_epoch(warmed_up: RunResult, corpus: str, tiny_model: str) -> None:
    record = warmed_up.record
    assert [path.removeprefix(warmed_up.out) for path in record["paths"]] == [f"/checkpoint-{n}" for n in (3, 6, 9)]
    assert record["counts"]["in"] == record["counts"]["rows"] == 12
    assert record["loss"]["after"] < record["loss"]["before"] - 0.1
    rates = [learning_rate(path) for path in record["paths"]]
    assert None not in rates
    assert 0.01 > rates[0] > rates[1] > rates[2] > 0  # type: ignore[operator]
    settings = json.loads(Path(record["paths"][0], "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 16, 0.1)
    assert len(settings["target_modules"]) == 14  # of each layer the whole name
    assert record["next"].endswith(f"--model {tiny_model} --adapter {record['paths'][-1]} --optimizer adam")
    assert warmup(corpus, warmed_up.out, tiny_model, **FEW).repeated
    assert (Path(warmed_up.out) / "_SUCCESS").exists()


def test_the_loss_before_is_that_of_the_responses_of_the_smallest_ids(
    warmed_up: RunResult, corpus: str, tiny_model: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = pq.read_table(Path(corpus) / "corpus").sort_by("id").slice(0, 12).to_pylist()
    losses = []
    for row in rows:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        start, whole = (
            tokenizer.apply_chat_template(some, add_generation_prompt=ask, return_dict=True)["input_ids"]
            for some, ask in ((turns[:-1], True), (turns, False))
        )
        ids = torch.tensor(whole[:-1])  # without the line's end behind the end of turn
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[len(start) - 1 : -1], ids[len(start) :]))
    assert warmed_up.record["loss"]["before"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_killed_it_goes_on_from_the_last_whole_checkpoint(
    warmed_up: RunResult, corpus: str, tiny_model: str, tmp_path: Path
) -> None:
    out = shutil.copytree(warmed_up.out, tmp_path / "out")
    (out / "_SUCCESS").unlink()
    (out / "checkpoint-9" / "trainer_state.json").write_text('{"global_step"')  # killed as this was written
    kept = {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-[36]/*")}
    with pytest.raises(UserError, match="its epochs was 3 and now is 4"):
        warmup(corpus, str(out), tiny_model, **{**FEW, "epochs": 4})
    run = warmup(corpus, str(out), tiny_model, **FEW)
    assert not run.repeated
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert run.record["loss"] == pytest.approx(warmed_up.record["loss"], rel=1e-4)
    names = "checkpoint-9/adapter_model.safetensors"
    again, first = load_file(out / names), load_file(Path(warmed_up.out) / names)
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight)
    (out / "_SUCCESS").unlink()  # killed behind the last checkpoint
    assert warmup(corpus, str(out), tiny_model, **FEW).record["loss"] == pytest.approx(run.record["loss"])


def test_what_cannot_be_trained_on_is_rejected_with_a_reason(
    corpus: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(Path(corpus) / "corpus").sort_by("id").to_pylist()
    prompt = next(row for row in rows if row["source"] == "second")["messages"][0]["content"]
    strict = refusing(tiny_model, tmp_path / "strict", f"messages[0]['content'] == {prompt!r}", "not this one")
    out = tmp_path / "out"
    few = "--limit 3 --epochs 1 --lora-rank 2 --batch-size 2 --lora-targets q_proj --sources second --max-length 16"
    assert main(["warmup", corpus, "--out", str(out), "--model", strict, *few.split()]) == 0
    shown = capsys.readouterr().out
    assert "3 conversations in = 2 trained on + 1 rejects, 1 epochs, 1 steps, loss " in shown
    assert f"\n{out}/checkpoint-1\n" in f"\n{shown}"
    (reject,) = [json.loads(line) for line in (out / "rejects" / "warmup.jsonl").read_text().splitlines()]
    assert reject["source"] == "second"
    assert "not this one" in reject["reason"]
    assert json.loads((out / "checkpoint-1" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    every = refusing(tiny_model, tmp_path / "every", "true", "none of them")
    with pytest.raises(UserError, match="no conversation can be trained on"):
        warmup(corpus, str(tmp_path / "none"), every, **FEW)


@pytest.mark.parametrize(
    ("options", "rows"), [({}, 32), ({"per_source": 2}, 4), ({"limit": 1}, 1), ({"sources": ["first"]}, 20)]
)
def test_a_twentieth_of_the_corpus_or_at_least_32_conversations_are_taken(
    options: Any, rows: int, corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(model: str, examples: Any, out: str, recipe: Any) -> tuple[float, float]:
        assert recipe.steps(len(examples)) == 4
        (Path(out) / "checkpoint-4").mkdir()
        (Path(out) / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
        return 2.0, 1.0

    monkeypatch.setattr("raydpp.warmup.training.train_adapter", trained)
    assert warmup(corpus, str(tmp_path / "out"), tiny_model, **options).record["counts"]["rows"] == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "--epochs 0: it must be at least 1"),
        ({"lora_rank": 0}, "--lora-rank 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_length": 7}, "--max-length 7: it must be at least 8"),
        ({"learning_rate": 0.0}, "--learning-rate 0: it must be a number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"seed": -1}, "--seed -1"),
        ({"out": "s3://bucket/out"}, "s3://bucket/out: Trainer writes .* not to a URL"),
        ({"out": "memory://out"}, "not to a URL"),
        ({"sources": ["third"]}, "no source 'third'"),
        ({"limit": 0}, "--limit 0"),
        ({"corpus": "/nowhere"}, "no folder /nowhere"),
        ({"model": "no/such-model"}, "could not be loaded"),
        ({"lora_targets": ["nowhere"]}, "--lora-targets: Target modules .*nowhere.* not found"),
        ({"learning_rate": 1e30, "epochs": 1}, "the loss became .*: give a lower --learning-rate than 1e"),
    ],
)
def test_mistakes_are_refused(options: Any, words: str, corpus: str, tiny_model: str, tmp_path: Path) -> None:
    given = {"corpus": corpus, "out": str(tmp_path / "out"), "model": tiny_model, **FEW, **options}
    with pytest.raises(UserError, match=words):
        warmup(**given)
