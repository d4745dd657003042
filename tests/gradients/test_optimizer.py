from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydpp.errors import UserError
from raydpp.gradients.adapters import attach_adapter
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.fingerprint import fingerprint
from raydpp.gradients.model import load_model, load_tokenizer
from raydpp.gradients.optimizer import adam_scales, learning_rate, moments_file
from raydpp.gradients.projection import Projection
from raydpp.gradients.representations import load_extractor

Build = Callable[..., Any]
DIMENSION, RANK, SEED = 64, 4, 3


@pytest.fixture(scope="module")
def trained(
    model_folder: Build, load: Build, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Mapping[str, Any]]:
    """A checkpoint that Trainer saved after three steps, and of each weight its state and group in the optimizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load(model_folder("llama"), torch.float32), config)
    draw = np.random.default_rng(0)
    rows = [{"input_ids": (ids := torch.from_numpy(draw.integers(3, 60, 9))), "labels": ids} for _ in range(6)]
    out = str(tmp_path_factory.mktemp("trained"))
    options: dict[str, Any] = {"adam_beta2": 0.9, "adam_epsilon": 1e-5, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(
        out, max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, save_steps=3, **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    optimizer: Any = trainer.optimizer
    of = {id(p): (optimizer.state[p], group) for group in optimizer.param_groups for p in group["params"]}
    return f"{out}/checkpoint-3", {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


@pytest.fixture
def damaged(trained: tuple[str, Any], tmp_path: Path) -> Callable[[Callable[[Any], Any]], str]:
    """The checkpoint with another optimizer's state, made from its own."""

    def made(change: Callable[[Any], Any]) -> str:
        folder = shutil.copytree(trained[0], tmp_path / "checkpoint")
        held = torch.load(folder / "optimizer.pt", weights_only=True)
        torch.save(change(held), folder / "optimizer.pt")
        return str(folder)

    return made


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_features_are_of_each_examples_own_gradient_over_the_root_of_the_second_moment(
    layers: str, trained: tuple[str, Any], model_folder: Build, load: Build, examples: Build, loss_alone: Build
) -> None:
    from peft import PeftModel

    checkpoint, states = trained
    folder, given = model_folder("llama"), examples(5, 20, 9, 14)
    config = ExtractorConfig(
        folder, "gradient", Adapter(checkpoint, layers=layers), DIMENSION, RANK, SEED, "float64", 40, optimizer="adam"
    )
    found = load_extractor(config)(given).features
    reference = PeftModel.from_pretrained(load(folder), checkpoint, is_trainable=True).double().eval()
    weights = {n: p for n, p in reference.named_parameters() if p.requires_grad and (layers == "all" or ".1." in n)}
    expected = []
    for example in given:
        gradients = {}
        for name, gradient in zip(
            weights, torch.autograd.grad(loss_alone(reference, example), [*weights.values()]), strict=True
        ):
            state, group = states[name]
            unbiased = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            gradients[short] = gradient / (unbiased.sqrt() + group["eps"])
        expected.append(project(gradients))
    wanted = torch.stack(expected).numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)
    plain = load_extractor(replace(config, optimizer="sgd"))(given).features
    assert np.abs(plain @ plain.T - wanted @ wanted.T).max() > 0.01


def project(gradients: Mapping[str, Tensor]) -> Tensor:
    """The (D,) projection of gradients that are there in full."""
    shapes = {name: (gradient.shape[0], gradient.shape[1]) for name, gradient in gradients.items()}
    projection, total = Projection(shapes, DIMENSION, RANK, SEED), torch.zeros(1, DIMENSION, dtype=torch.float64)
    for name, gradient in gradients.items():
        eye = torch.eye(gradient.shape[1], dtype=torch.float64)[None]
        projection.add_layer(total, name, projection.reduce_inputs(name, eye), gradient.T[None])
    return total[0]


def scales(model: str, checkpoint: str) -> dict[str, Tensor]:
    return adam_scales(*attach_adapter(load_model(model, torch.device("cpu")), Adapter(checkpoint)), checkpoint)


def with_names(held: Any, names: list[str]) -> Any:
    """As a torch of names would save it, in another order."""
    (group, *_) = held["param_groups"]
    return {**held, "param_groups": [{**group, "params": group["params"][::-1], "param_names": names[::-1]}]}


def test_parameters_with_names_are_found_by_them_and_amsgrad_divides_by_its_largest(
    trained: tuple[str, Any], damaged: Build, model_folder: Build
) -> None:
    checkpoint, states = trained
    expected = scales(model_folder("llama"), checkpoint)
    assert len(expected) == len(states) == 28
    changed = damaged(lambda held: with_names(held, list(states)))
    Path(changed, "optimizer.pt").rename(Path(changed, "optimizer.bin"))  # as accelerate calls it
    for name, scale in scales(model_folder("llama"), changed).items():
        assert torch.equal(scale, expected[name])
    shutil.rmtree(changed)

    def larger(held: Any) -> Any:
        for state in held["state"].values():
            state["max_exp_avg_sq"] = 4 * state["exp_avg_sq"]
        return held

    for name, scale in scales(model_folder("llama"), damaged(larger)).items():
        assert ((scale - expected[name] / 2).abs() <= 1e-2 * expected[name]).all()  # but for eps


def regrouped(held: Any) -> Any:
    """As LoRA+ has it: A's, then B's."""
    (group, *_) = held["param_groups"]
    halves = [group["params"][::2], group["params"][1::2]]
    return {**held, "param_groups": [{**group, "params": half} for half in halves]}


def exchanged(held: Any) -> Any:
    (group, *_) = held["param_groups"]
    return {**held, "param_groups": [{**group, "params": group["params"][::-1]}]}


def renamed(held: Any, names: Mapping[str, str]) -> Any:
    states = {key: {names.get(n, n): value for n, value in state.items()} for key, state in held["state"].items()}
    return {**held, "state": states}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (regrouped, "2 groups of nameless parameters"),
        (exchanged, r"moments of shape \(\d+, \d+\) after 3 steps where base_model.* is \(\d+, \d+\)"),
        (lambda held: renamed(held, {"exp_avg": "state1", "exp_avg_sq": "state2"}), "no second moment of Adam"),
        (lambda held: renamed(held, {"exp_avg_sq": "exp_avg_sq_row"}), "no second moment of Adam"),
        (lambda held: {**held, "state": {}}, "not an optimizer's whole state"),
        (lambda held: {"param_groups": [], "state": {}}, "is of 0 parameters, not the 28"),
        (lambda held: with_names(held, [f"other.{n}" for n in range(28)]), "is of 28 parameters, not the 28"),
        (lambda held: [], "not an optimizer's whole state"),
        (lambda held: {**held, "state": {0: Path("x")}}, "not an optimizer's whole state"),  # weights_only refuses it
    ],
)
def test_a_state_that_is_not_adams_over_this_adapter_is_refused(
    change: Callable[[Any], Any], words: str, damaged: Build, model_folder: Build
) -> None:
    with pytest.raises(UserError, match=rf"(?s){words}.*leave out --optimizer adam"):
        scales(model_folder("llama"), damaged(change))


def test_a_folder_without_a_state_is_refused(saved_adapter: Build, model_folder: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a fresh adapter has none: give --adapter"):
        moments_file("fresh")
    for folder in (saved_adapter(model_folder("llama")), str(tmp_path / "nowhere"), "org/on-a-hub"):
        with pytest.raises(UserError, match=r"has no optimizer.pt or optimizer.bin.*DeepSpeed"):
            moments_file(folder)


def test_tables_of_other_moments_have_another_fingerprint(
    trained: tuple[str, Any], damaged: Build, tiny_model: str
) -> None:
    checkpoint, _ = trained
    tokenizer = load_tokenizer(tiny_model)

    def made(folder: str, optimizer: Any) -> Any:
        config = ExtractorConfig(tiny_model, adapter=Adapter(folder), dtype="float32", optimizer=optimizer)
        return fingerprint(config, Masking(), tokenizer, "int8")

    plain, adam = made(checkpoint, "sgd"), made(checkpoint, "adam")
    assert "optimizer" not in plain
    assert {**plain, "optimizer": adam["optimizer"]} == adam
    for state in (held := torch.load(f"{checkpoint}/optimizer.pt", weights_only=True))["state"].values():
        state["exp_avg_sq"] *= 2
    assert made(damaged(lambda _: held), "adam")["optimizer"] != adam["optimizer"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"epoch": 2.0, "rates": {0.5: 9.0, 1.0: 8.0, 1.5: 4.0, 2.0: 2.0, 2.5: 1.0}}, 3.0),
        ({"epoch": 1.5, "rates": {0.5: 9.0, 1.0: 8.0, 1.25: 5.0, 1.5: 4.0}}, 4.5),
        ({"epoch": 1.0, "rates": {0.5: 3.0}}, 3.0),
        ({"epoch": 2.0, "rates": {0.5: 9.0}}, None),  # logged too seldom
        ({"epoch": None, "rates": {}}, None),
        (None, None),
        ("{", None),
    ],
)
def test_the_learning_rate_is_the_mean_of_the_epoch_that_ends_there(
    state: Any, expected: float | None, tmp_path: Path
) -> None:
    if isinstance(state, dict):
        logged = [{"epoch": epoch, "learning_rate": rate} for epoch, rate in state["rates"].items()]
        state = json.dumps({"epoch": state["epoch"], "log_history": [*logged, {"epoch": 1.0, "eval_loss": 1.0}]})
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(state)
    assert learning_rate(str(tmp_path)) == expected


def test_trainer_logs_what_the_learning_rate_is_read_from(trained: tuple[str, Any]) -> None:
    checkpoint, _ = trained  # one epoch of three steps, and a schedule that falls from 0.01 to 0 in three
    assert learning_rate(checkpoint) == pytest.approx(0.01 * (1 + 2 / 3 + 1 / 3) / 3)
