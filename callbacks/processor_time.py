"""Processor seconds of training: they hardly depend on what else the machine does, other than those of a clock.

| metric | content |
|---|---|
| `val/cpu_seconds` | of training so far without validations, of all threads of this process; other ranks not included |

The seconds of a clock are a column of metrics.csv.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from pkm_lightning.callbacks.base import in_training
from pkm_lightning.callbacks.stopwatch import Stopwatch, TimedCallback

__all__ = ["ProcessorTime"]


class ProcessorStopwatch(Stopwatch):
    """A stopwatch of the seconds that the processors work for this process."""

    @staticmethod
    def _now() -> float:
        return time.process_time()


class ProcessorTime(TimedCallback):
    """Stopwatch of the processors, read at each validation; a resumed run continues from the reading before."""

    def __init__(self) -> None:
        super().__init__()
        self.stopwatch = ProcessorStopwatch()

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return {"seconds": self.stopwatch.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.stopwatch = ProcessorStopwatch(state["seconds"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the reading."""
        if in_training(trainer):
            pl_module.log("val/cpu_seconds", self.stopwatch.seconds, rank_zero_only=True)
