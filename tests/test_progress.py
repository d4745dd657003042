from __future__ import annotations

import itertools
import logging
import sys
import time
from typing import Any

import pytest

from raydpp.progress import BarCounter, RemoteCounter, progress_bar, reporter, watch


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "raydpp")
    return caplog


def test_off_a_terminal_a_bar_is_records_of_the_log(
    said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("stage", 7, "picks", 3) as bar:
        time.sleep(0.02)
        bar.set_postfix(log_gain="-0.250", refresh=False)
        bar.update(4)
    assert [message.split(" [")[0] for message in said.messages] == ["stage: 3/7 picks", "stage: 7/7 picks"]
    assert said.messages[-1].endswith("picks/s, log_gain=-0.250]")
    last: Any = said.records[-1]
    assert (last.event, last.done, last.total, last.unit) == ("progress", 7, 7, "picks")
    assert last.seconds >= 0.02
    assert last.rate == pytest.approx(4 / last.seconds, rel=0.2)  # what was done before is no part of it
    assert not capsys.readouterr().err


def test_without_a_total_it_says_how_many(said: pytest.LogCaptureFixture) -> None:
    with progress_bar("stage", None, "rows") as bar:
        bar.update(7)
    assert said.messages[-1].startswith("stage: 7/? rows [")


def test_off_a_terminal_it_speaks_now_and_then_alone(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    with progress_bar("stage", 10_000, "rows") as bar:
        monkeypatch.setattr(bar, "_time", lambda: next(clock) / 100)
        bar.start_t = bar.last_print_t = 0
        for _ in range(10_000):
            bar.update()
        spent = next(clock) / 100
    assert 3 <= len(said.messages) <= 3 + spent / 10


def test_picks_are_counted_once_and_not_those_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, int]] = []
    monkeypatch.setattr("raydpp.progress.count", lambda *what: counted.append(what))
    for unit in ("picks", "rows"):
        with progress_bar("stage", 7, unit, 3) as bar:
            bar.update(2)
            bar.refresh()
            bar.update(1)
    assert [what for what in counted if what[1]] == [("picks", 2), ("picks", 1)]


def test_a_name_in_a_title_is_not_obeyed_by_the_terminal(said: pytest.LogCaptureFixture) -> None:
    with progress_bar("measure: \x1b[2J\u202e", 7, "picks") as bar:
        bar.update(7)
    assert "measure: \ufffd[2J\ufffd: " in said.text


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


def test_the_bar_follows_what_tasks_report(cluster: None, said: pytest.LogCaptureFixture) -> None:
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
    assert "7/7" in said.messages[-1]


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
