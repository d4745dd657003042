from __future__ import annotations

from typing import Any

import pytest

from raydpp.progress import Counter, progress_bar, reporter, watch


def test_the_bar_follows_what_tasks_report(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    counter: Any = ray.remote(num_cpus=0)(Counter).remote()

    @ray.remote
    def task() -> int:
        report = reporter(counter, every=0.0)
        for step in range(1, 8):
            report(step, 0.0)
        return 7

    with progress_bar("stage", 7, "picks") as bar:
        reference = task.remote()
        watch([reference], counter, bar)
        assert ray.get(counter.done.remote()) == 7
    assert "stage" in capsys.readouterr().err


def test_the_bar_says_how_many_of_several_tasks_are_done(cluster: None) -> None:
    import ray

    counter: Any = ray.remote(num_cpus=0)(Counter).remote()
    task = ray.remote(lambda: None)
    with progress_bar("stage", 7, "picks") as bar:
        watch([task.remote() for _ in range(3)], counter, bar)
        assert "tasks=3/3" in bar.postfix


def test_a_failing_task_is_raised(cluster: None) -> None:
    import ray

    @ray.remote
    def task() -> None:
        raise ValueError("what went wrong")

    counter: Any = ray.remote(num_cpus=0)(Counter).remote()
    with progress_bar("stage", 7, "picks") as bar, pytest.raises(ValueError, match="what went wrong"):
        watch([task.remote()], counter, bar)


def test_ctrl_c_reaches_the_task_which_hands_in_what_it_has(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    counter: Any = ray.remote(num_cpus=0)(Counter).remote()

    @ray.remote
    def task(counter: Any) -> int:
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
    with progress_bar("stage", None, "picks") as bar:
        reference = task.remote(counter)
        assert watch([reference], counter, bar, stoppable=True)
        assert 0 < ray.get(reference) < 100_000
        assert "log_gain=-0.5" in bar.postfix
    calls.clear()
    counter = ray.remote(num_cpus=0)(Counter).remote()
    with progress_bar("stage", 7, "picks") as bar, pytest.raises(KeyboardInterrupt):
        watch([task.remote(counter)], counter, bar)
    ray.get(counter.stop.remote())
