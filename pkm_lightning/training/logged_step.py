"""The x axis of all loggers: the number of optimizer steps done."""

from __future__ import annotations

import lightning as L
import torch


def log_step(module: L.LightningModule, step: int) -> None:
    """Puts what the same hook logs at `step`.

    Lightning 2.6 takes a metric named `step` for the axis, and does not log it as one. The axis of its own counts the
    steps before the one that logs: 49, 249, and 500 in the test.
    """
    if module.trainer.loggers:
        # In double precision, which has every whole number; the same on all ranks.
        module.log("step", torch.tensor(step, dtype=torch.float64), sync_dist=True, rank_zero_only=True)
