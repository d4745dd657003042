from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raydpp import runs
from raydpp.cluster import Here
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.objective import standardise
from raydpp.errors import UserError
from raydpp.extract.workers import tokenize_row
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.fingerprint import fingerprint
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.optimizer import learning_rate
from raydpp.gradients.projection import Projection
from raydpp.gradients.representations import load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.select.inputs import partitioned
from raydpp.select.stage import select
from raydpp.select.target import TargetScore, score_by_target, target_tasks
from raydpp.storage import Folder
from raydpp.tables import open_table, write_table


def sphere(rows: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, 6))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def written(folder: Path, name: str, features: np.ndarray, **columns: Any) -> str:
    ids = [f"{name}{n:03d}" for n in range(len(features))]
    rows = pa.table({"id": ids, "gradient": list(features.astype(np.float32)), **columns})
    write_table(Folder.at(folder), f"{name}.parquet", rows)
    return str(folder / f"{name}.parquet")


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """A folder of 60 examples in three files."""
    rows = sphere(60, 0)
    for n in range(3):
        some = {"source": ["s"] * 20, "response_tokens": np.arange(20) + 1}
        written(tmp_path / "pool", "abc"[n], rows[20 * n : 20 * n + 20], **some)
    return str(tmp_path / "pool")


def expected(pool: np.ndarray, groups: list[np.ndarray], form: TargetScore = "mean") -> np.ndarray:
    if form == "nearest":
        return np.max([pool @ row for group in groups for row in group], axis=0)
    cosines = np.array([pool @ (group.mean(0) / np.linalg.norm(group.mean(0))) for group in groups])
    against = np.minimum(cosines.min(0), 0) if form == "conflict-aware" else 0
    return cosines.max(0) + against


@pytest.mark.parametrize("form", get_args(TargetScore))
@pytest.mark.parametrize("partitions", [1, 3])
def test_a_score_is_a_cosine_with_the_nearest_of_the_targets(
    pool: str, tmp_path: Path, partitions: int, form: TargetScore
) -> None:
    one, two = sphere(10, 1), sphere(7, 2)
    sources = np.array(["x"] * 4 + ["y"] * 6)  # two tasks in one table of two files
    written(tmp_path / "one", "a", one[::2], source=sources[::2])
    written(tmp_path / "one", "b", one[1::2], source=sources[1::2])
    targets = [str(tmp_path / "one"), written(tmp_path, "two", two)]
    table = open_table(pool, "gradient")
    opened = [open_table(url, "gradient") for url in targets]
    scored = score_by_target(Here(), [table], partitioned(table, partitions, False, Here()), [opened], form)
    rows = scored.read_columns(scored.parts, ["id", "target"])
    found = dict(zip(rows["id"].to_pylist(), rows["target"].to_pylist(), strict=True))
    scores = expected(sphere(60, 0), [one[:4], one[4:], two], form)
    np.testing.assert_allclose([found[key] for key in sorted(found)], scores, atol=1e-6)
    assert scored.has("target")


def test_the_rows_of_targets_come_by_task_in_the_order_of_ids(tmp_path: Path) -> None:
    one, two = sphere(6, 1), sphere(3, 2)
    sources = np.array(["y", "x"] * 3)
    for name, some in (("c", [0, 3, 4]), ("a", [5, 1, 2])):
        written(tmp_path / "one", name, one[some], source=sources[some])
    opened = [open_table(url, "gradient") for url in (str(tmp_path / "one"), written(tmp_path, "b", two))]
    for targets in (opened, opened[::-1]):
        found = target_tasks(targets)
        assert len(found) == 3
        for rows, expected_rows in zip(found, (one[[5, 1, 3]], one[[2, 0, 4]], two), strict=True):
            np.testing.assert_allclose(rows, expected_rows, atol=1e-6)


@pytest.mark.parametrize("form", ["nearest", "conflict-aware"])
def test_the_form_of_the_score_is_an_option(pool: str, tmp_path: Path, form: TargetScore) -> None:
    aims = [sphere(4, 5), sphere(5, 6)]
    given = [written(tmp_path, f"aim{n}", aim) for n, aim in enumerate(aims)]
    run = select(pool, str(tmp_path / "out"), 8, target=given, target_score=form, quality_weight=1.0)
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    best = np.argsort(-expected(sphere(60, 0), aims, form))[:8]
    assert pq.read_table(Path(run.out) / "selection")["id"].to_pylist() == [ids[n] for n in best]
    assert set(best) != set(np.argsort(-expected(sphere(60, 0), aims))[:8])


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_weight_one_takes_the_nearest_and_less_balances_with_diversity(
    pool: str, tmp_path: Path, weight: float
) -> None:
    target = written(tmp_path, "target", sphere(9, 5))
    run = select(pool, str(tmp_path / "out"), 8, target=[target], quality_weight=weight)
    picks = pq.read_table(Path(run.out) / "selection")["id"].to_pylist()
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    scores = standardise(expected(sphere(60, 0), [sphere(9, 5)]))
    if weight == 1:
        best = np.argsort(-scores)[:8]
    else:
        made = {name: run.record[name] for name in ("gamma", "quality_unit")}
        best = greedy_map(sphere(60, 0), 8, quality=scores, quality_weight=weight, ids=ids, **made).indices
        assert best.tolist() != np.argsort(-scores)[:8].tolist()
    assert picks == [ids[n] for n in best]
    again = {"target": [target], "quality_weight": weight}
    assert select(pool, run.out, 8, **again).repeated  # type: ignore[arg-type]
    written(tmp_path, "target", sphere(8, 6))
    with pytest.raises(UserError, match="input files have changed"):
        select(pool, run.out, 8, **again)  # type: ignore[arg-type]


def test_a_target_counts_beside_other_scores(pool: str, tmp_path: Path) -> None:
    target = written(tmp_path, "target", sphere(9, 5))
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    rating = np.random.default_rng(3).random(60)
    lines = [f"{one},{value}" for one, value in zip(ids, rating, strict=True)]
    (tmp_path / "ratings.csv").write_text("id,rating\n" + "\n".join(lines))
    quality = ["target=3", "rating=1"]
    given: dict[str, Any] = {"target": [target], "scores": [str(tmp_path / "ratings.csv")], "quality": quality}
    run = select(pool, str(tmp_path / "out"), 6, **given, method="quality")
    scores = expected(sphere(60, 0), [sphere(9, 5)])
    total = 0.75 * standardise(scores) + 0.25 * standardise(rating)
    assert pq.read_table(Path(run.out) / "selection")["id"].to_pylist() == [ids[n] for n in np.argsort(-total)[:6]]


def test_mistakes_are_refused(pool: str, table: str, tmp_path: Path) -> None:
    out, target = str(tmp_path / "out"), written(tmp_path, "target", sphere(9, 5))
    with pytest.raises(UserError, match="counts by --quality-weight, which is 0"):
        select(pool, out, 5, target=[target])
    with pytest.raises(UserError, match="--target-score nearest needs something to aim at"):
        select(pool, out, 5, target_score="nearest", quality_weight=1)
    with pytest.raises(UserError, match="--target-score max: use one of mean, nearest"):
        select(pool, out, 5, target=[target], target_score="max", quality_weight=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--method round-robin needs something to aim at: give --target"):
        select(pool, out, 5, method="round-robin")
    with pytest.raises(UserError, match=r"has 6 dimensions and .* 64"):
        select(pool, out, 5, target=[table], quality_weight=1)
    both = np.repeat([[1.0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0]], 2, axis=0)
    with pytest.raises(UserError, match="cancel out"):
        select(pool, out, 5, target=[written(tmp_path, "both", both)], quality_weight=1)
    taken = written(tmp_path, "taken", sphere(9, 5), target=np.arange(9.0))
    with pytest.raises(UserError, match="has a column 'target'"):
        select(taken, out, 5, target=[target], quality_weight=1)


DIMENSION, RANK = 256, 8


def finished_table(folder: Path, features: np.ndarray, ids: list[str], sources: list[str], **facts: Any) -> str:
    """A folder as extract leaves it."""
    columns = {"id": ids, "source": sources, "gradient": list(features.astype(np.float32))}
    write_table(Folder.at(folder), "gradients/part-0.parquet", pa.table({**columns, "response_tokens": [1] * len(ids)}))
    counts = {"rows": len(ids)}
    record = {
        "stage": "extract",
        "config": {"out": str(folder)},
        "inputs": [],
        "corpus": None,
        "counts": counts,
        **facts,
    }
    Folder.at(folder).write_json(runs.RECORD, record)
    Folder.at(folder).write_text(runs.SUCCESS, "")
    return str(folder)


def extracted(
    folder: Path, model: str, checkpoint: str, optimizer: Any, examples: list[TokenizedExample], sources: list[str]
) -> str:
    """What extract writes of some examples, in float32, without its actors."""
    config = ExtractorConfig(
        model, "gradient", Adapter(checkpoint), DIMENSION, RANK, dtype="float64", optimizer=optimizer
    )
    made = fingerprint(config, Masking(), load_tokenizer(model), "float32")
    ids = [f"{n:03d}" for n in range(len(examples))]
    features = load_extractor(config)(examples).features
    return finished_table(folder, features, ids, sources, fingerprint=made, learning_rate=learning_rate(checkpoint))


def directions(model: str, checkpoint: str, adam: bool, examples: list[TokenizedExample]) -> np.ndarray:
    """The (n, D) projections, of unit norm, of the gradients that autograd gives for each example alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    reference = PeftModel.from_pretrained(base, checkpoint, is_trainable=True).double().eval()
    weights = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    state = torch.load(f"{checkpoint}/optimizer.pt", weights_only=True)
    rows = []
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        counts = torch.from_numpy(example.response[1:])
        loss = torch.nn.functional.cross_entropy(reference(input_ids=ids[None]).logits[0, :-1][counts], ids[1:][counts])
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        if adam:
            for n, name in enumerate(gradients):
                second = state["state"][n]["exp_avg_sq"].double() / (1 - 0.999 ** float(state["state"][n]["step"]))
                gradients[name] = gradients[name] / (second.sqrt() + 1e-8)
        short = {n.removeprefix("base_model.model.").removesuffix(".default.weight"): g for n, g in gradients.items()}
        projection = Projection({n: (g.shape[0], g.shape[1]) for n, g in short.items()}, DIMENSION, RANK)
        total = torch.zeros(1, DIMENSION, dtype=torch.float64)
        for layer, g in short.items():
            eye = torch.eye(g.shape[1], dtype=torch.float64)[None]
            projection.add_layer(total, layer, projection.reduce_inputs(layer, eye), g.T[None])
        rows.append(total[0].numpy() / float(total.norm()))
    return np.stack(rows)


def test_several_checkpoints_rank_as_less_does(
    warmed_up: runs.RunResult, corpus: str, tiny_model: str, tmp_path: Path
) -> None:
    """Xia et al. 2024, section 3.2 with section 4: Adam's steps of the examples, plain gradients of the target.

    Both sides of the comparison are projected by the same map.
    """
    rows = pq.read_table(Path(corpus) / "corpus").sort_by("id").to_pylist()
    examples = [tokenize_row(row["messages"], ExtractorConfig(tiny_model), Masking()) for row in rows]
    pool, aim, groups = examples[:28], examples[28:], ["x"] * 5 + ["y"] * 7
    tables, targets, scores, rates = [], [], [], []
    for n, checkpoint in enumerate(warmed_up.record["paths"][::2]):  # after the first epoch, and the third
        tables.append(extracted(tmp_path / f"table{n}", tiny_model, checkpoint, "adam", pool, ["s"] * 28))
        targets.append(extracted(tmp_path / f"target{n}", tiny_model, checkpoint, "sgd", aim, groups))
        sides = directions(tiny_model, checkpoint, True, pool), directions(tiny_model, checkpoint, False, aim)
        means = np.stack([sides[1][:5].mean(0), sides[1][5:].mean(0)])
        scores.append(sides[0] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T)  # (n, 2)
        logged = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
        rates.append(np.mean([one["learning_rate"] for one in logged if "learning_rate" in one][6 * n : 6 * n + 3]))
    weighed = np.average(scores, axis=0, weights=rates)
    expected = np.argsort(-weighed.max(1))
    for other in (np.mean(scores, axis=0).max(1), scores[0].max(1), weighed[:, 0], weighed.mean(1)):
        assert np.argsort(-other).tolist() != expected.tolist()
    given: dict[str, Any] = {"target": targets[::-1], "checkpoints": [tables[1]], "quality_weight": 1}
    run = select(tables[0], str(tmp_path / "out"), 28, **given)
    picks = pq.read_table(Path(run.out) / "selection")["id"].to_pylist()
    assert picks == [f"{n:03d}" for n in expected]
    opened = [open_table(url, "gradient") for url in (*tables, *targets)]
    parts = partitioned(opened[0], None, False, Here())
    scored = score_by_target(Here(), opened[:2], parts, [[opened[2]], [opened[3]]])
    found = scored.read_columns(scored.parts, ["target"])["target"].to_numpy()
    np.testing.assert_allclose(found, weighed.max(1), atol=1e-5)
    assert select(tables[0], run.out, 28, **given).repeated
    alone = select(tables[0], str(tmp_path / "alone"), 28, target=targets[:1], quality_weight=1)
    picks = pq.read_table(Path(alone.out) / "selection")["id"].to_pylist()
    assert picks == [f"{n:03d}" for n in np.argsort(-scores[0].max(1))]


MADE: dict[str, Any] = {
    "model": "m",
    "representation": "gradient",
    "masking": {"max_length": 64},
    "adapter": {"kind": "trained LoRA", "digest": "one", "layers": "all"},
    "optimizer": {"kind": "adam", "moments": "a"},
}


@pytest.fixture
def at(tmp_path: Path) -> Callable[..., str]:
    """From a name, a checkpoint and how many rows to a folder as extract leaves it."""

    def made(name: str, digest: str, rows: int = 6, source: str = "s", rate: float | None = 1.0, **other: Any) -> str:
        about = copy.deepcopy(MADE)
        about["adapter"]["digest"] = digest
        ids = [f"{n:03d}" for n in range(rows)]
        features = sphere(rows, len(digest))
        facts = {"fingerprint": {**about, **other}, "learning_rate": rate}
        return finished_table(tmp_path / name, features, ids, [source] * rows, **facts)

    return made


@pytest.mark.parametrize(
    ("tables", "targets", "words"),
    [
        (["two"], [], "--checkpoints needs --target"),
        (["two"], ["one"], "no --target is of the checkpoint of t0: extract the target with its --adapter"),
        (
            ["two"],
            ["one", "two", "other"],
            r"v2 is of no checkpoint .* from table in adapter digest, from t0 in",
        ),
        (["one"], ["one"], "table and t0 are of the same checkpoint"),
        (["two", "two"], ["one", "two"], "t0 and t1 are of the same checkpoint"),
    ],
)
def test_targets_and_tables_that_do_not_go_together_are_named(
    tables: list[str], targets: list[str], words: str, at: Callable[..., str], tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "target": [at(f"v{n}", digest) for n, digest in enumerate(targets)],
        "checkpoints": [at(f"t{n}", digest) for n, digest in enumerate(tables)],
    }
    with pytest.raises(UserError, match=words):
        select(at("table", "one"), str(tmp_path / "out"), 3, quality_weight=1, **given)


def test_what_is_missing_at_a_checkpoint_is_named(at: Callable[..., str], pool: str, tmp_path: Path) -> None:
    table, v, other = at("table", "one", 8), at("v", "one", 4), at("w", "two", 4)

    def refused(words: str, target: list[str], *checkpoints: str) -> None:
        with pytest.raises(UserError, match=words):
            select(table, str(tmp_path / "out"), 3, quality_weight=1, target=target, checkpoints=[*checkpoints])

    refused("2 of the 8 examples of table are not in few, such as 006", [v, other], at("few", "two", 6))
    whole = at("whole", "two", 9)  # more than the table has
    refused("'s' is in 2 targets of the checkpoint of whole", [v, other, at("again", "two", 4)], whole)
    refused("'r' is in no target of the checkpoint of table", [v, at("r", "two", 4, source="r")], whole)
    refused("pool does not say its checkpoint", [v, other], pool)
    refused("whole2 cannot be compared: their model differs", [v, other], at("whole2", "two", 8, model="n"))
    refused("v2 is of no .* from whole in masking max_length", [v, at("v2", "two", masking={"max_length": 8})], whole)
    assert select(table, str(tmp_path / "out"), 3, quality_weight=1, target=[v, other], checkpoints=[whole]).out


def test_where_a_learning_rate_is_not_known_all_checkpoints_count_the_same(
    at: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raydpp")
    picks = []
    for name, rates in {"known": (1.0, 1.0), "unknown": (None, 9.0)}.items():
        table, other = at(f"{name}1", "one", 20, rate=rates[0]), at(f"{name}three", "three", 20, rate=rates[1])
        targets = [at(f"{name}v", "one", 4), at(f"{name}w", "three", 4)]
        given: dict[str, Any] = {"target": targets, "checkpoints": [other], "quality_weight": 1}
        run = select(table, str(tmp_path / f"{name}out"), 20, **given)
        picks.append(pq.read_table(Path(run.out) / "selection")["id"].to_pylist())
    assert picks[0] == picks[1]
    assert caplog.text.count("all checkpoints count the same") == 1
    assert "the learning rate of unknown1 is not known" in caplog.text


def test_a_target_may_differ_in_the_optimizer_alone(at: Callable[..., str], tmp_path: Path) -> None:
    table, out = at("table", "one"), str(tmp_path / "out")
    with pytest.raises(UserError, match="their adapter digest differs"):
        select(table, out, 3, target=[at("v", "two")], quality_weight=1)
    with pytest.raises(UserError, match="their optimizer differs"):
        select(table, out, 3, owned=[at("o", "one", optimizer=None)])
    assert select(table, out, 3, target=[at("w", "one", optimizer=None)], quality_weight=1).out
