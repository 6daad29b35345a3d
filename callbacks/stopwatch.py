"""Stopwatches that add up over stops and resumes, and the base of callbacks that measure the time of training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from pkm_lightning.callbacks.base import in_training
from pkm_lightning.ops.compile_clock import compile_processor_seconds, compile_seconds


class Stopwatch:
    """A clock that is stopped at first and leaves out the compilation of CPU kernels; `seconds` is read at any time.

    Args:
        seconds: the reading to start from, as of the run that is resumed.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    def start(self) -> None:
        """Starts the clock; has no effect while it runs."""
        if self._started is None:
            self._started = self._now()

    def stop(self) -> None:
        """Stops the clock; has no effect while it is stopped."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """The running time so far."""
        return self._before + (0.0 if self._started is None else self._now() - self._started)

    @staticmethod
    def _now() -> float:
        return time.perf_counter() - compile_seconds()


class ProcessorStopwatch(Stopwatch):
    """A stopwatch of the seconds that the processors work for this process, in all its threads."""

    @staticmethod
    def _now() -> float:
        return time.process_time() - compile_processor_seconds()


class TimedCallback(L.Callback):
    """A callback whose stopwatches run while the model trains and are stopped during validations.

    Attributes:
        stopwatch: of the clock.
        processor_stopwatch: of the processors, which depends less on what else the machine does.

    Args:
        arguments: those of the next class in the order of inheritance.
    """

    def __init__(self, **arguments: Any) -> None:
        # For subclasses that also inherit from a callback of Lightning.
        super().__init__(**arguments)
        self.stopwatch = Stopwatch()
        self.processor_stopwatch: Stopwatch = ProcessorStopwatch()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the stopwatches, which in a resumed run continue from the time before."""
        self._start_stopwatches()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the stopwatches."""
        self._stop_stopwatches()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the stopwatches again, if the validation was part of training."""
        # The validation that precedes training ends before they are first started.
        if in_training(trainer):
            self._start_stopwatches()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the stopwatches."""
        self._stop_stopwatches()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops the stopwatches."""
        self._stop_stopwatches()

    def _start_stopwatches(self) -> None:
        self.stopwatch.start()
        self.processor_stopwatch.start()

    def _stop_stopwatches(self) -> None:
        self.stopwatch.stop()
        self.processor_stopwatch.stop()
