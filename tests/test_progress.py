from __future__ import annotations

import sys
from typing import Any

import pytest

from raydpp.progress import BarCounter, RemoteCounter, progress_bar, reporter, watch


def test_off_a_terminal_a_bar_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("stage", 7, "picks") as bar:
        bar.update(7)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert all(line.startswith("stage: ") for line in said.splitlines())
    assert "7/7" in said.splitlines()[-1]


def test_a_name_in_a_title_is_not_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measure: \x1b[2J\u202e", 7, "picks") as bar:
        bar.update(7)
    assert "measure: \ufffd[2J\ufffd: " in capsys.readouterr().err


def test_on_a_terminal_it_moves_in_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("stage", 7, "picks") as bar:
        bar.update(7)
    assert capsys.readouterr().err.startswith("\rstage: ")


def test_a_task_in_this_process_moves_the_bar() -> None:
    with progress_bar("stage", 7, "picks") as bar:
        report = reporter(BarCounter(bar), every=0.0)
        report(3, float("nan"))
        report(7, -0.25)
        assert bar.n == 7
        assert bar.postfix == "log_gain=-0.250"


def test_the_bar_follows_what_tasks_report(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    @ray.remote
    def task(counter: RemoteCounter) -> int:
        report = reporter(counter, every=0.0)
        for step in range(1, 8):
            report(step, 0.0)
        return 7

    counter = RemoteCounter()
    with progress_bar("stage", 7, "picks") as bar:
        watch([task.remote(counter)], counter, bar)
        assert counter.state() == (7, 0.0)
    assert "7/7" in capsys.readouterr().err


def test_the_bar_says_how_many_of_several_tasks_are_done(cluster: None) -> None:
    import ray

    task = ray.remote(lambda: None)
    with progress_bar("stage", 7, "picks") as bar:
        watch([task.remote() for _ in range(3)], RemoteCounter(), bar)
        assert "tasks=3/3" in bar.postfix


def test_a_failing_task_is_raised(cluster: None) -> None:
    import ray

    @ray.remote
    def task() -> None:
        raise ValueError("what went wrong")

    with progress_bar("stage", 7, "picks") as bar, pytest.raises(ValueError, match="what went wrong"):
        watch([task.remote()], RemoteCounter(), bar)


def test_ctrl_c_reaches_the_task_which_hands_in_what_it_has(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    @ray.remote
    def task(counter: RemoteCounter) -> int:
        report = reporter(counter, every=0.0)
        for step in range(1, 100_000):
            try:
                report(step, -0.5)
            except KeyboardInterrupt:
                return step
        return -1

    wait, calls = ray.wait, []

    def pressed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return wait(*arguments, **options)

    monkeypatch.setattr(ray, "wait", pressed)
    counter = RemoteCounter()
    with progress_bar("stage", None, "picks") as bar:
        reference = task.remote(counter)
        watch([reference], counter, bar, stoppable=True)
        assert 0 < ray.get(reference) < 100_000
        assert "log_gain=-0.5" in bar.postfix
    calls.clear()
    counter = RemoteCounter()
    with progress_bar("stage", 7, "picks") as bar, pytest.raises(KeyboardInterrupt):
        watch([task.remote(counter)], counter, bar)
    counter.stop()
