"""What the Trainer's loggers get, and when: figures at the number of optimizer steps done, the last step included.

Lightning 2.6 counts the steps before the one that logs: 49, 249, and 500 in the test. A metric named `step` would be
the axis too, but also the `{step}` in names of checkpoints, which is then the step of the last figures.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import Tensor


class _StepConnector(_LoggerConnector):
    """Lightning's way from logged metrics to the loggers, at the steps of this package."""

    @property
    def should_update_logs(self) -> bool:
        """Whether the step that was just made logs."""
        return super().should_update_logs or logs_at(self.trainer, self.trainer.global_step)

    def log_metrics(self, metrics: dict[str, Tensor], step: int | None = None) -> None:
        """Passes figures to all loggers."""
        super().log_metrics(metrics, self.trainer.global_step if step is None else step)


def follow_steps(trainer: L.Trainer | None) -> None:
    """Makes the loggers of `trainer` follow the steps, before it runs anything; repeated calls have no effect."""
    if trainer is not None and not isinstance(trainer._logger_connector, _StepConnector):
        trainer._logger_connector = _StepConnector(trainer)


def logs_at(trainer: L.Trainer, step: int) -> bool:
    """Returns whether optimizer step `step`, counted from 1, logs: it ends an interval, or the training."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    # To the Trainer an interval of 0 means never.
    return interval > 0 and (step % interval == 0 or step == trainer.max_steps)
