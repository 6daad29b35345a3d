"""Slot usage: which rows of tables and which experts are read, counted in every micro-batch of the training.

Metrics, every `every_n_steps`, over all ranks: `train/usage/NAME/FIGURE`. NAME is the reads of a layer (`layer3.slot`,
`layer3.expert`, `layer3.variant.slot`; `layer3.virtual`: UltraMem's virtual slots) or a table that several layers share
(`table0`: their sum). FIGURE is, over a window of the last steps (formulas in `pkm_lightning.usage.slot_metrics`),
`used_percent`, `kl_count`, `kl_weight`, `gini`, `top50`, `top90`, `top99`; `kl_rows` and `kl_columns` where a slot is a
pair of sub-keys; `dead`, slots without a read for `dead_after` steps; and `effective`, the effective number of slots
per read, mean over the window's log steps. With `per_head` also `train/usage/NAME.head0/kl_rows` and `kl_columns` per
head, and with `per_head=full` `used_percent`, `kl_count`, `kl_weight` and `dead`. Weights count by absolute value.

The window has two halves: it holds more than `window` / 2 and at most `window` of the last steps, all of them at every
multiple of `window`. It and `dead` count steps that a rollback repeats again. Figures since the start are in usage.json
(`pkm_lightning.usage.figures.report`), on the screen when training ends, and in loggers (`slot_panels`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.callbacks.base import in_training
from pkm_lightning.callbacks.slot_panels import draw_panels
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted
from pkm_lightning.callbacks.usage_report import save_report
from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.model import Traces
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.logged_step import logs_at
from pkm_lightning.usage.counters import UsageCounters
from pkm_lightning.usage.figures import window_figures
from pkm_lightning.usage.head_counts import PerHead
from pkm_lightning.usage.slot_readers import find_readers

__all__ = ["SlotUsage"]

#: Logged names outlive those of the code: earlier runs, reports and dashboards have them.
_LOGGED = "train/usage"
_KEY = "callbacks.slot_usage"
_log = logging.getLogger(__name__)


class SlotUsage(L.Callback):
    """Counter of reads, which never waits for the device between logs. Its state is the counters.

    Args:
        path: usage.json, written at the end of training and when it is interrupted.
        every_n_steps: optimizer steps between logs, a multiple of trainer.log_every_n_steps; None: that number.
        window: optimizer steps of the window, 2 or more; an odd number counts as the next even one.
        dead_after: steps without a read after which a slot counts as dead, 1 or more.
        per_head: what is counted per head: nothing (False), its sub-keys (`halves`, or True) or its slots (`full`).
        panels_every_n_steps: optimizer steps between panels in loggers; None: at validations.
        max_slots: tables with more rows are not counted, since the counters of a layer take 52 bytes per slot on every
            rank; None: all are counted.

    Attributes:
        counters: those of the training under way, or of the last one; None before it, and for a model without slots.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        *,
        path: str,
        every_n_steps: int | None,
        window: int,
        dead_after: int,
        per_head: bool | str,
        panels_every_n_steps: int | None,
        max_slots: int | None = None,
    ) -> None:
        optional = {"every_n_steps": every_n_steps, "panels_every_n_steps": panels_every_n_steps}
        for name, value in {**optional, "max_slots": max_slots}.items():
            if value is not None:
                check_integer(f"{_KEY}.{name}", value, low=1)
        check_integer(f"{_KEY}.window", window, low=2)
        check_integer(f"{_KEY}.dead_after", dead_after, low=1)
        if not isinstance(per_head, bool):
            check_choice(f"{_KEY}.per_head", per_head, ("false", "halves", "full"))
        self.path = Path(path)
        self.every_n_steps, self.panels_every_n_steps = every_n_steps, panels_every_n_steps
        self.window, self.dead_after, self.max_slots = window, dead_after, max_slots
        self.per_head = _per_head(per_head)
        self.counters: UsageCounters | None = None
        self._saved: dict[str, Any] = {}
        # The last micro-batch, of which the panels need more than the counters hold.
        self._traces: Traces = {}
        self._batch: dict[str, Tensor] = {}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses an interval between logs at which nothing is logged, with a ConfigError."""
        self._check_interval(config["trainer"]["log_every_n_steps"])

    def _check_interval(self, log_every: int) -> None:
        if self.every_n_steps is not None and log_every and self.every_n_steps % log_every:
            raise ConfigError(
                f"{_KEY}.every_n_steps={self.every_n_steps} is not a multiple of trainer.log_every_n_steps={log_every}"
                f", the steps at which anything is logged; set {_KEY}.every_n_steps to a multiple of it, or to null."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count, if the model has slots."""
        assert isinstance(pl_module, LanguageModule)
        self._check_interval(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        counters = UsageCounters(
            pl_module.model,
            window=self.window,
            per_head=self.per_head,
            max_slots=self.max_slots,
            device=trainer.strategy.root_device,
            step=trainer.global_step,
        )
        skipped = find_readers(pl_module.model).keys() - counters.readers.keys()
        if skipped and trainer.is_global_zero:
            _log.warning("%s have more slots than %s.max_slots and are not counted", ", ".join(sorted(skipped)), _KEY)
        if self._saved:
            counters.load_state_dict(self._saved)
            self._saved = {}
        if counters.readers:
            self.counters = counters
            self._watcher = lambda traces, batch: self._watch(trainer, traces, batch)
            pl_module.watch.watchers.append(self._watcher)

    def _watch(self, trainer: L.Trainer, traces: Traces, batch: dict[str, Tensor]) -> None:
        assert self.counters is not None
        self.counters.add(traces, batch)
        if self._step_logs_figures(trainer):
            self.counters.add_effective(traces, batch)
        self._traces, self._batch = traces, batch

    def _step_logs_figures(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step + 1  # before the update
        return logs_at(trainer, step) if self.every_n_steps is None else step % self.every_n_steps == 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Logs the figures when they are due, and draws the panels where they have an interval of their own."""
        # DeepSpeed accumulates itself, and Lightning calls this hook in every micro-batch.
        if self.counters is None or trainer.fit_loop._should_accumulate():
            return
        if self._step_logs_figures(trainer):
            pl_module.log_dict({f"{_LOGGED}/{name}": value for name, value in self._figures().items()})
        step = trainer.global_step + 1
        if self.panels_every_n_steps is not None and step % self.panels_every_n_steps == 0:
            draw_panels(trainer, self.counters, self._traces, self._batch, step)

    def _figures(self) -> dict[str, float]:
        assert self.counters is not None
        return window_figures(self.counters, self.dead_after)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Ends the step, before a rollback may set `trainer.global_step` back."""
        if self.counters is not None and not trainer.fit_loop._should_accumulate():
            self.counters.end_step()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the panels, unless they have an interval of their own."""
        if self.counters is not None and in_training(trainer) and self.panels_every_n_steps is None:
            draw_panels(trainer, self.counters, self._traces, self._batch, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes usage.json and prints its main figures."""
        if self.counters is not None:
            save_report(trainer, self.counters, self.dead_after, self.path, show=True)
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes usage.json, unless that would wait for other ranks, which may have ended."""
        together = isinstance(exception, RunInterrupted) or not is_distributed()
        try:
            if self._traces and self.counters is not None and together:
                save_report(trainer, self.counters, self.dead_after, self.path, show=False)
        # Such as a full disk or a failed device: the error that was raised first must be reported.
        except (OSError, RuntimeError) as error:
            _log.warning("%s is not written: %s", self.path, error)
        self._stop(pl_module)

    def _stop(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self._traces, self._batch = {}, {}
        if self.counters is not None and self._watcher in pl_module.watch.watchers:
            pl_module.watch.watchers.remove(self._watcher)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters, summed over the ranks. Collective: call on all ranks."""
        return self._saved if self.counters is None else self.counters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the counters until training starts: the model may not be built yet."""
        self._saved = state


def _per_head(value: bool | str) -> PerHead | None:
    return None if value in (False, "false") else "full" if value == "full" else "halves"
