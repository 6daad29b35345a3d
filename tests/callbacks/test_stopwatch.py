"""Seconds add up over stops, and do not pass in between."""

from __future__ import annotations

import importlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
from tolerances import EXACT_FLOAT

from pkm_lightning.callbacks.stopwatch import ProcessorStopwatch, Stopwatch, TimedCallback
from pkm_lightning.ops import compile_clock


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


def test_the_compilation_of_kernels_is_left_out(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles a kernel and, within it, one that it calls, on a processor that does other work half of the time."""
    monkeypatch.setattr(time, "process_time", lambda: clock[0] / 2)
    watch, processors = Stopwatch(), ProcessorStopwatch()
    watch.start()
    processors.start()
    clock[0] += 2
    compile_clock.begin()
    clock[0] += 30
    compile_clock.begin()
    clock[0] += 5
    assert (watch.seconds, processors.seconds) == (2.0, pytest.approx(1.0, rel=EXACT_FLOAT))
    compile_clock.end()
    clock[0] += 5
    compile_clock.end()
    clock[0] += 1
    assert (watch.seconds, processors.seconds) == (3.0, pytest.approx(1.5, rel=EXACT_FLOAT))


def test_numba_reports_its_compilations() -> None:
    numba = pytest.importorskip("numba")
    importlib.import_module("pkm_lightning.ops.numba_threads")
    before = compile_clock.compile_seconds()
    numba.njit(lambda x: x + 1)(1)
    assert compile_clock.compile_seconds() > before


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
