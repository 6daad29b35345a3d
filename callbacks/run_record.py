"""The content of run.json except its status: where a run took place, how far it came, what it reached.

run.json is not optional, so `fit` adds this callback to every Trainer, and no YAML configures it. It logs no metric;
`pkm_lightning.training.record` has the table of keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import lightning as L

from pkm_lightning.callbacks.base import find_callback, in_training
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.callbacks.stopwatch import ProcessorStopwatch, Stopwatch, TimedCallback
from pkm_lightning.callbacks.throughput import Throughput
from pkm_lightning.data.base import data_of, fingerprint_of, n_facts_of, own_test_of
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.machine import device_name, peak_memory_bytes

__all__ = ["RunRecord"]

_log = logging.getLogger(__name__)


class RunRecord(TimedCallback):
    """Collector of the record. A resumed run continues from its state: best validation, throughput, seconds trained.

    Attributes:
        metrics: those of the last test, or of the last validation outside training.
        on_start: called on rank 0 when training starts: the data are there and the checkpoint is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.on_start: Callable[[], None] | None = None
        self._recall: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}
        self._best: dict[str, float | int] | None = None
        self._throughput: dict[str, float] = {}
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the best validation so far, the last throughput, and the seconds trained, of clock and processors."""
        return {
            "best_validation": self._best,
            "throughput": self._throughput,
            "seconds": self.stopwatch.seconds,
            "processor_seconds": self.processor_stopwatch.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self._best, self.stopwatch = state["best_validation"], Stopwatch(state["seconds"])
        # Checkpoints of earlier versions have none: what was not counted stays unknown.
        self.processor_stopwatch = ProcessorStopwatch(state.get("processor_seconds", math.nan))
        self._throughput = state["throughput"]

    def fields(self, trainer: L.Trainer) -> dict[str, Any]:
        """Returns what is known so far; reads no device, so that it can be called while a device hangs."""
        device = trainer.strategy.root_device
        return {
            "world_size": trainer.world_size,
            "device": device_name(device),
            "data": fingerprint_of(data_of(trainer)),
            "facts": n_facts_of(data_of(trainer)),
            "own_test": own_test_of(data_of(trainer)),
            "peak_memory_bytes": peak_memory_bytes(device),
            "best_validation": self._best,
            "metrics": {**self.metrics, "recall": self._recall} if self._recall else dict(self.metrics),
            **self._counts,
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets processor seconds that would not be all; calls `on_start`."""
        if trainer.world_size > 1 or trainer.strategy.root_device.type != "cpu":
            # Those of other ranks and of devices are not known here, nor ever after in a run that goes on elsewhere.
            self.processor_stopwatch = ProcessorStopwatch(math.nan)
        super().on_train_start(trainer, pl_module)
        if self.on_start is not None and trainer.is_global_zero:
            self.on_start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Drops the best validation if a rollback has abandoned its step; keeps the last throughput."""
        # Only a rollback lowers the step counter.
        if trainer.global_step < self._step and self._best is not None and self._best["step"] > trainer.global_step:
            self._best = None
        self._step = trainer.global_step
        throughput = find_callback(trainer, Throughput)
        if throughput is not None and throughput.figures:
            self._throughput = throughput.figures

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the loss if it is the lowest of training; keeps all metrics outside training."""
        if in_training(trainer):
            # NaN, or no validation loss at all, is never the best.
            loss = float(trainer.callback_metrics.get("val/loss", math.nan))
            if math.isfinite(loss) and (self._best is None or loss < self._best["loss"]):
                self._best = {"loss": loss, "step": trainer.global_step}
        elif not trainer.sanity_checking:
            self._keep_metrics(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the metrics, and the report on recall if there is one."""
        self._keep_metrics(trainer)
        recall = find_callback(trainer, Recall)
        if recall is not None:
            self._recall = recall.report

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts tokens and seconds; Lightning calls this also for a run that has nothing left to train."""
        self._count(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Counts tokens and seconds of a run that fails or is interrupted."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self._count(trainer, pl_module)
        except Exception as error:  # such as a failed device: the error that was raised first must be reported
            _log.warning("run.json lacks the tokens and seconds since the run was started: %s", error)

    def _keep_metrics(self, trainer: L.Trainer) -> None:
        # `step` is the x axis of the loggers.
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "step"}

    def _count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        tokens, seconds = int(pl_module.tokens_seen), self.stopwatch.seconds
        self._counts = {
            "tokens": tokens,
            "seconds": {"train": round(seconds, 3)},
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }
        if self._throughput:
            self._counts["throughput"] = self._throughput
        processor = self.processor_stopwatch.seconds
        self._counts["seconds"]["processor"] = round(processor, 3) if math.isfinite(processor) else None
