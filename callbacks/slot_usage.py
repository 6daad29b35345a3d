"""Which slots are read - rows of tables and experts - counted on every micro-batch of the training.

Metrics, each `every_n_steps`, over all ranks: `train/usage/NAME/FIGURE`, where NAME is a layer's reads (`layer3.slot`,
`layer3.expert`, `layer3.variant.slot`; `layer3.virtual`: UltraMem's virtual slots) or a table that several layers share
(`table0`: their sum). FIGURE is, over a window of the last steps (`pkm_lightning.usage.slot_metrics` has the
formulas), `used_percent`, `kl_count`, `kl_weight`, `gini`, `top50`, `top90`, `top99`; `kl_rows` and `kl_columns` where
a slot is a pair of sub-keys; `dead`, slots without a read for `dead_after` steps; and `effective`, slots within one
read, mean over the window's log steps. With `per_head` also `train/usage/NAME.head0/kl_rows` and `kl_columns`, by head,
and with `per_head=full` `used_percent`, `kl_count`, `kl_weight` and `dead`. Weights count by their absolute value.

The window is cut into two halves: it holds more than `window` / 2 and at most `window` of the last steps, all of them
at its every multiple. It and `dead` count the steps that were watched: those that a rollback repeats count again. The
figures since the start are in usage.json (`pkm_lightning.usage.figures.report`), on the screen when training
ends, and in TensorBoard's panels (`slot_panels`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from pkm_lightning.callbacks.slot_panels import draw_panels
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted
from pkm_lightning.callbacks.stopwatch import in_training
from pkm_lightning.callbacks.usage_report import print_report, write_report
from pkm_lightning.data.base import tokenizer_of
from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.model import Traces
from pkm_lightning.training import LanguageModule
from pkm_lightning.usage.counters import UsageCounters
from pkm_lightning.usage.figures import logged, report
from pkm_lightning.usage.head_counts import PerHead
from pkm_lightning.usage.slot_readers import find_readers

_KEY = "callbacks.slot_usage"
_log = logging.getLogger(__name__)


class SlotUsage(L.Callback):
    """Counts without waiting for the device, and logs. Its state is the counters; a model without slots has none.

    Args:
        path: of usage.json; written at the end of training and when it is interrupted.
        every_n_steps: optimizer steps between logs, a multiple of trainer.log_every_n_steps; None: that.
        window: optimizer steps of the window, 2 or more; an odd number counts as the next.
        dead_after: steps without a read after which a slot counts as dead, 1 or more.
        per_head: of each head count nothing (False), its sub-keys (`halves`, or True) or all its slots (`full`).
        panels_every_n_steps: optimizer steps between panels in TensorBoard; None: at validations.
        max_slots: reads of tables with more rows are not counted, since each layer's counters take 52 bytes a slot on
            every rank; None: all are counted.

    Attributes:
        counters: those of the training under way, or of the last; None before it, and for a model without slots.

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
        self.per_head = _kind(per_head)
        self.counters: UsageCounters | None = None
        self._saved: dict[str, Any] = {}
        # The last micro-batch, which is looked at more closely where a log or a panel is due.
        self._traces: Traces = {}
        self._batch: dict[str, Tensor] = {}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses what cannot work with the rest of a configuration, before anything starts.

        Raises:
            ConfigError: an interval at which nothing is logged.
        """
        self._check_interval(config["trainer"]["log_every_n_steps"])

    def _check_interval(self, log_every: int) -> None:
        if self.every_n_steps is not None and log_every and self.every_n_steps % log_every:
            raise ConfigError(
                f"{_KEY}.every_n_steps={self.every_n_steps} is no multiple of trainer.log_every_n_steps={log_every}, "
                "the steps that anything is logged at; give one, or null."
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters, summed over the ranks; every rank must ask."""
        return self._saved if self.counters is None else self.counters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the counters until training starts: the model may not be built yet."""
        self._saved = state

    # --- while training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count, if there is anything to count."""
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
        left_out = find_readers(pl_module.model).keys() - counters.readers.keys()
        if left_out and trainer.is_global_zero:
            _log.warning("%s have more slots than %s.max_slots and are not counted", ", ".join(sorted(left_out)), _KEY)
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
        if self._logs_after(trainer):
            self.counters.add_effective(traces, batch)
        self._traces, self._batch = traces, batch

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Logs, before callbacks that write down what was logged see the end of the batch."""
        # Engines that accumulate by themselves come here with every micro-batch.
        if self.counters is None or trainer.fit_loop._should_accumulate():
            return
        if self._logs_after(trainer):
            pl_module.log_dict({f"train/usage/{name}": value for name, value in self._figures().items()})
        step = trainer.global_step + 1
        if self.panels_every_n_steps is not None and step % self.panels_every_n_steps == 0:
            self._draw(trainer, step)

    def _logs_after(self, trainer: L.Trainer) -> bool:
        """The step under way is one that figures are logged of."""
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (trainer.global_step + 1) % every == 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Ends the step: `trainer.global_step` may go back after it."""
        if self.counters is not None and not trainer.fit_loop._should_accumulate():
            self.counters.end_step()

    def _figures(self) -> dict[str, float]:
        assert self.counters is not None
        return logged(self.counters, self.dead_after)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the panels, unless they have an interval of their own."""
        if self.counters is not None and in_training(trainer) and self.panels_every_n_steps is None:
            self._draw(trainer, trainer.global_step)

    def _draw(self, trainer: L.Trainer, step: int) -> None:
        assert self.counters is not None
        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards:
            tokenizer = tokenizer_of(getattr(trainer, "datamodule", None))
            draw_panels(
                boards if trainer.is_global_zero else [], self.counters, self._traces, self._batch, tokenizer, step
            )

    # --- the end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes usage.json and prints its main figures."""
        if self.counters is not None:
            content = report(self.counters, trainer.global_step, self.dead_after)
            if trainer.is_global_zero:
                write_report(content, self.path)
                print_report(content)
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes usage.json, unless other ranks would be waited for that may not come."""
        together = isinstance(exception, RunInterrupted) or not dist.is_initialized() or trainer.world_size == 1
        try:
            if self._traces and self.counters is not None and together:
                content = report(self.counters, trainer.global_step, self.dead_after)
                if trainer.is_global_zero:
                    write_report(content, self.path)
        except (OSError, RuntimeError) as error:  # a full disk, a failed device: what was raised first is to be told
            _log.warning("%s is not written: %s", self.path, error)
        self._stop(pl_module)

    def _stop(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self._traces, self._batch = {}, {}
        if self.counters is not None and self._watcher in pl_module.watch.watchers:
            pl_module.watch.watchers.remove(self._watcher)


def _kind(per_head: bool | str) -> PerHead | None:
    return None if per_head in (False, "false") else "full" if per_head == "full" else "halves"
