"""Seconds that add up over stops and resumes, and a callback whose seconds are those of training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class Stopwatch:
    """Starts stopped; `seconds` may be read at any time.

    Args:
        seconds: what an earlier run had on the clock.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    def start(self) -> None:
        """Runs from here on; no effect while running."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stands still; no effect while stopped."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Total running time so far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)


class TimedCallback(L.Callback):
    """Its `stopwatch` runs while the model trains and stands still in validations.

    Args:
        arguments: of the next class, where there are several.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stopwatch = Stopwatch()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training time begins, or goes on from that of earlier sittings."""
        self.stopwatch.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training time stands still."""
        self.stopwatch.stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """It goes on, if the validation was part of training."""
        if in_training(trainer):
            self.stopwatch.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training time ends."""
        self.stopwatch.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Training time ends here too."""
        self.stopwatch.stop()


def in_training(trainer: L.Trainer) -> bool:
    """True in a fit, and in its validations but for the one that precedes training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def step_will_log(trainer: L.Trainer) -> bool:
    """True before the update of a step that logs, in its last micro-batch."""
    due: bool = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
    return due and not trainer.fit_loop._should_accumulate()


def step_logs(trainer: L.Trainer) -> bool:
    """True at the end of the last micro-batch of a step that logs."""
    due: bool = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
    return due and not trainer.fit_loop._should_accumulate()
