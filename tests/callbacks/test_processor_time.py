"""Processor seconds: of training without validations, over resumes, whatever the clock shows."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.callbacks import ProcessorTime


def test_it_logs_what_the_processors_have_worked_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, logged = [50.0], []
    monkeypatch.setattr(time, "process_time", lambda: seconds[0])
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False)
    module: Any = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))

    def train_and_validate(callback: ProcessorTime) -> None:
        seconds[0] += 2
        callback.on_validation_start(trainer, module)
        seconds[0] += 30
        callback.on_validation_epoch_end(trainer, module)
        callback.on_validation_end(trainer, module)

    first = ProcessorTime()
    first.on_train_start(trainer, module)
    train_and_validate(first)
    train_and_validate(first)
    assert logged == [("val/cpu_seconds", 2.0), ("val/cpu_seconds", 4.0)]
    resumed = ProcessorTime()
    resumed.load_state_dict(first.state_dict())
    seconds[0] += 100
    resumed.on_train_start(trainer, module)
    train_and_validate(resumed)
    assert logged[-1] == ("val/cpu_seconds", 6.0)
    trainer.state.fn = "validate"
    resumed.on_validation_epoch_end(trainer, module)
    assert len(logged) == 3
