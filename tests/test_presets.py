from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from raydpp.cli import find_stage, main, parse
from raydpp.presets import PRESETS, SOURCES


def test_every_option_of_a_preset_is_one_of_its_command() -> None:
    assert PRESETS.keys() == SOURCES.keys()
    for commands in PRESETS.values():
        for command, options in commands.items():
            assert options.keys() <= inspect.signature(find_stage(command)).parameters.keys()


def test_a_preset_sets_what_is_not_given(tmp_path: Path) -> None:
    extract, select, measure = (find_stage(name) for name in ("extract", "select", "measure"))
    found = parse(extract, ["C", "--out", "O", "--model", "M", "--preset", "paper"])
    assert (found.lora_rank, found.lora_init, found.dimension) == (512, "gaussian", 4096)
    assert found.lora_targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert parse(extract, ["C", "--out", "O", "--model", "M"]).lora_init == "signs"
    given = ["C", "--out", "O", "--preset", "paper", "--gamma", "0.5", "--quality-weight", "0.1"]
    found = parse(select, given)
    assert (found.gamma, found.quality_scale, found.quality_weight) == (0.5, "quantiles", 0.1)
    (tmp_path / "own.yaml").write_text("preset: paper\ngamma: 2\n")  # in a file, which wins too
    found = parse(measure, ["T", "--out", "O", "--config", str(tmp_path / "own.yaml")])
    assert (found.gamma, found.drop_below) == (2.0, -7.0)


def test_help_says_what_a_preset_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Wang et al. (2024, arXiv 2402.02318) used, --kernel rbf, --gamma 0.25" in shown
    with pytest.raises(SystemExit) as ended:
        main(["select", "T", "--out", "O", "--preset", "mine"])
    assert ended.value.code == 2
    assert "--preset: invalid choice: 'mine' (choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    assert "--preset" not in capsys.readouterr().out
