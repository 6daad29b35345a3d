"""Hopeless runs of a sweep end early, by the median stopping rule.

Golovin et al., "Google Vizier", KDD 2017, section 3.2.1. At each validation the best value of the objective so far is
compared with what the other runs of the sweep had at that step, read from their metrics.csv; one that is worse than
their median ends the run. It writes its last checkpoint and is not tested, its status in run.json is `pruned`, and the
sweeper gets its last value. Runs that were stopped count at the steps that they reached: a median of the others alone
would become stricter with every run. It works with every sweeper, and does nothing outside of a sweep.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from pkm_lightning.callbacks.base import configured, in_training
from pkm_lightning.callbacks.metrics_csv import MetricsCSV, metrics_of
from pkm_lightning.errors import ConfigError, check_integer, check_range
from pkm_lightning.storage import open_regular
from pkm_lightning.training import LanguageModule

__all__ = ["MedianStopping"]

_log = logging.getLogger(__name__)


class MedianStopping(L.Callback):
    """Judge of a run by the median of its siblings; it logs no metric.

    Args:
        min_runs: other runs that must have been validated at a step before one is stopped there, 1 or more.
        warm_up: share of the steps before which no run is stopped, 0 to 1.

    Attributes:
        reason: why the run was stopped; None if it was not.
    """

    def __init__(self, *, min_runs: int, warm_up: float) -> None:
        check_integer("callbacks.median_stopping.min_runs", min_runs, 1)
        check_range("callbacks.median_stopping.warm_up", warm_up, 0, 1)
        self.min_runs, self.warm_up = min_runs, warm_up
        self.reason: str | None = None
        self._best = math.inf

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a sweep whose runs write no metrics.csv, with a ConfigError."""
        if config.get("sweep_dir") is not None and not configured(config, MetricsCSV):
            raise ConfigError(
                "callbacks.median_stopping reads metrics.csv of the other runs, and callbacks.metrics_csv is off; add "
                "that, or remove ~callbacks.median_stopping."
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value so far, less being better."""
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        self._best = state["best"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares, and asks the Trainer to stop."""
        assert isinstance(pl_module, LanguageModule)
        config, step = pl_module.config, trainer.global_step
        folder, name = config.get("sweep_dir"), config.get("objective")
        if folder is None or name is None or not in_training(trainer):
            return
        sign = -1 if config["objective_mode"] == "max" else 1
        # A figure that is not finite is the worst.
        value = float(metrics_of(trainer, "val/").get(name, math.nan))
        self._best = min(self._best, sign * value if math.isfinite(value) else math.inf)
        n_steps = int(config["trainer"]["max_steps"])
        if not self.warm_up * n_steps <= step < n_steps:
            return
        # Decided on the first rank: others may see the files of a shared disk later.
        reason = (
            self._reason(Path(folder), Path(config["run_dir"]), name, sign, step) if trainer.is_global_zero else None
        )
        self.reason = trainer.strategy.broadcast(reason)
        if self.reason is not None:
            _log.info("stopped: %s", self.reason)
            trainer.should_stop = True

    def _reason(self, folder: Path, run_dir: Path, name: str, sign: int, step: int) -> str | None:
        others = [sign * value if math.isfinite(value) else math.inf for value in _values(folder, run_dir, name, step)]
        if len(others) < self.min_runs or self._best <= median(others):
            return None
        best = f"{sign * self._best:.4g}" if math.isfinite(self._best) else "not finite"
        return (
            f"its best {name} at step {step} is {best}, worse than the median {sign * median(others):.4g} of "
            f"{len(others)} other runs of the sweep"
        )


def _values(folder: Path, run_dir: Path, name: str, step: int) -> Iterator[float]:
    """Yields `name` at the last validation up to `step` of each other run below `folder` that came that far."""
    for file in folder.rglob("metrics.csv"):
        if file.parent == run_dir:
            continue
        try:
            with open_regular(file, newline="", encoding="utf-8") as opened:
                rows = [(int(row["step"]), row.get(name)) for row in csv.DictReader(opened) if row["step"]]
        except (OSError, ValueError, KeyError, csv.Error):
            continue  # a line of it is being written
        at_step = [value for at, value in rows if value and at <= step]
        if at_step and rows[-1][0] >= step:
            yield float(at_step[-1])
