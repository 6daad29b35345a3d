"""The figures of the last validation, one of which a sweep optimises.

`fit` adds this callback where a sweep or `objective=` asks for it, and no YAML configures it. It logs no metric.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from pkm_lightning.callbacks.metrics_csv import metrics_of
from pkm_lightning.errors import ConfigError

__all__ = ["Objective"]


class Objective(L.Callback):
    """Keeper of the figures of the last validation, in training or after it.

    Args:
        name: that of the figure in metrics.csv.
        mode: `min` or `max`: which values are better.

    Attributes:
        figures: all figures of the last validation.
        step: optimizer steps done at that validation; None before the first.
    """

    def __init__(self, *, name: str, mode: str) -> None:
        self.name, self.mode = name, mode
        self.figures: dict[str, float] = {}
        self.step: int | None = None

    @property
    def value(self) -> float:
        """The figure at the last validation."""
        return self.figures[self.name]

    def record(self) -> dict[str, Any]:
        """Returns what run.json has under `objective`."""
        return {"name": self.name, "mode": self.mode, "value": self.value, "step": self.step}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the figures.

        Raises:
            ConfigError: the objective is none of them.
        """
        if trainer.sanity_checking:
            return
        figures = {name: float(value) for name, value in metrics_of(trainer, "val/").items()}
        if self.name not in figures:
            raise ConfigError(
                f"objective={self.name} was not logged by the validation of step {trainer.global_step}; it has: "
                f"{', '.join(sorted(figures))}."
            )
        self.figures, self.step = figures, trainer.global_step
