"""Seconds add up over stops, and stand still in between."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.callbacks.stopwatch import Stopwatch, TimedCallback, step_logs, step_will_log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sets the time by hand: `clock[0] = 5.0`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_it_starts_stopped_from_what_an_earlier_sitting_had(clock: list[float]) -> None:
    watch = Stopwatch(7.0)
    clock[0] += 5
    assert watch.seconds == 7.0


def test_running_time_adds_up_and_pauses_do_not(clock: list[float]) -> None:
    watch = Stopwatch()
    watch.start()
    clock[0] += 2
    watch.start()  # no effect while running
    clock[0] += 1
    assert watch.seconds == 3.0
    watch.stop()
    clock[0] += 10
    watch.stop()  # no effect while stopped
    assert watch.seconds == 3.0
    watch.start()
    clock[0] += 4
    assert watch.seconds == 7.0


@pytest.mark.parametrize(
    ("fn", "sanity", "passed"), [("fit", False, 5.0), ("fit", True, 2.0), ("validate", False, 2.0)]
)
def test_a_callback_counts_training_and_no_validation(clock: list[float], fn: str, sanity: bool, passed: float) -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=fn), sanity_checking=sanity)
    module: Any = None
    callback = TimedCallback()
    callback.on_train_start(trainer, module)
    clock[0] += 2
    callback.on_validation_start(trainer, module)
    clock[0] += 100
    callback.on_validation_end(trainer, module)
    clock[0] += 3
    callback.on_train_end(trainer, module)
    clock[0] += 100
    assert callback.stopwatch.seconds == passed


def test_a_step_that_logs_is_known_before_and_after_its_update() -> None:
    def trainer(step: int, *, accumulates: bool = False) -> Any:
        loop = SimpleNamespace(_should_accumulate=lambda: accumulates)
        return SimpleNamespace(global_step=step, log_every_n_steps=3, fit_loop=loop)

    assert [step_will_log(trainer(step)) for step in range(6)] == [False, False, True, False, False, True]
    assert [step_logs(trainer(step)) for step in range(1, 7)] == [False, False, True, False, False, True]
    assert not step_will_log(trainer(2, accumulates=True))
    assert not step_logs(trainer(3, accumulates=True))
