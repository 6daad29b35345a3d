"""A progress bar over optimizer steps: training data are endless, so that `max_steps` is what ends."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

__all__ = ["StepProgressBar"]


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar with `max_steps` as its total."""

    @property
    def total_train_batches(self) -> int | float:
        """The micro-batches of the whole run, or of the epoch where `max_steps` is unset."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns the metrics on the bar, without Lightning's version number of the log directory."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
