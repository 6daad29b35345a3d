"""Processor seconds of training so far, at each validation; those of a whole run stand in its run.json.

| metric | content |
|---|---|
| `val/cpu_seconds` | of training so far without validations, of all threads of this process; other ranks not included |

They depend less on what else the machine does than the seconds of the clock, a column of metrics.csv.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from pkm_lightning.callbacks.base import in_training
from pkm_lightning.callbacks.stopwatch import ProcessorStopwatch, TimedCallback

__all__ = ["ProcessorTime"]


class ProcessorTime(TimedCallback):
    """Stopwatch of the processors, read at each validation; a resumed run continues from the reading before."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return {"seconds": self.processor_stopwatch.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.processor_stopwatch = ProcessorStopwatch(state["seconds"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the reading."""
        if in_training(trainer):
            pl_module.log("val/cpu_seconds", self.processor_stopwatch.seconds, rank_zero_only=True)
