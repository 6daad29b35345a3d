"""Slot revival: gives slots that have not been read for long another start. Off by default; needs `slot_usage`.

A row is read where its keys lead, so new values alone bring no read; they make the next one useful. Its sources:

- `busy`: each dead row of a table (dead for all layers that share it) becomes a copy of one of the most-read rows of
  SlotUsage's window, plus noise. Keys stay. Works with every strategy, and leaves rows alone that tokens address.
- `queries`: a product-key slot (i, j) has no key of its own, so dead sub-keys are moved: those that no query of their
  head has chosen for `dead_after` steps, in whatever pair. Each moves to where the worst-served half query of the last
  micro-batch points (on the first rank; see `pkm_lightning.memory.revival`), plus noise; then the dead rows among the S
  pairs of each moved sub-key get values as from `busy`. Live slots never change.

The optimizer state of a revived row or sub-key is reset. At most `max_share` of a table's rows, and of the sub-keys of
a half, change at a time (rounded up), the longest unread first. Random numbers depend on the seed, the step and the
name only, and rows are chosen by sums over the ranks: all ranks agree, however tables are split. A revived slot has
`dead_after` steps to find readers before it may be revived again; SlotUsage's `dead` counts it until it is read. A
rollback undoes revivals with the values, and removes them from the history.

Metrics, at each log, since the start: `train/revived/NAME`, rows of `table0`, sub-keys of `layer3.slot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer

from pkm_lightning.callbacks.base import configured, engine_owns_parameters, find_callback
from pkm_lightning.callbacks.slot_usage import SlotUsage
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.engine import engine_of
from pkm_lightning.usage.query_recorder import QueryRecorder
from pkm_lightning.usage.revival import Revival, addressing_by_reader, check_revivable, check_settings
from pkm_lightning.usage.revival_history import RevivalHistory
from pkm_lightning.usage.slot_readers import Reader, find_readers, find_tables

__all__ = ["SlotRevival"]

#: Logged names outlive those of the code: earlier runs, reports and dashboards have them.
_LOGGED, _KEY = "train/revived", "callbacks.slot_revival"


class SlotRevival(L.Callback):
    """Revival of dead slots every `every_n_steps`. Its state is the history of revivals.

    Args:
        every_n_steps: optimizer steps between revivals, 1 or more.
        dead_after: steps without a read after which a slot is dead, 1 or more.
        max_share: largest share of a table's rows (and of a half's sub-keys) that changes at a time, 0 to 1.
        source: `busy` or `queries`.
        noise: standard deviation of the noise, over the RMS of the row or sub-key.

    Raises:
        ConfigError: a value out of range; when training starts, a setting that it cannot work with.
    """

    #: Methods of finetuning that restrict which rows change refuse callbacks that change others.
    changes_rows = True

    def __init__(self, *, every_n_steps: int, dead_after: int, max_share: float, source: str, noise: float) -> None:
        self._limits: dict[str, Any] = {"dead_after": dead_after, "max_share": max_share, "noise": noise}
        check_settings(f"{_KEY}.", every_n_steps=every_n_steps, source=source, **self._limits)
        self.every_n_steps, self.source = every_n_steps, source
        self.history = RevivalHistory()
        self._names: list[str] = []
        self._last_step = 0
        self._recorder = QueryRecorder({})

    @property
    def revived(self) -> dict[str, int]:
        """Numbers of rows and sub-keys revived so far, by name."""
        return dict.fromkeys(self._names, 0) | self.history.counts

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a configuration without slot_usage, or one that hides from source=queries what it needs.

        Raises:
            ConfigError: naming what to change.
        """
        usage = configured(config, SlotUsage)
        if not usage:
            raise _missing_usage()
        if self.source == "queries":
            _check_queries(
                counts_heads=usage[0].get("per_head") not in (False, "false"),
                engine_owns=engine_owns_parameters(config),
                compiled=config["model"]["compile"],
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what the model makes impossible; records queries where the source needs them."""
        assert isinstance(pl_module, LanguageModule)
        usage = _slot_usage(trainer)
        readers = find_readers(pl_module.model)
        tables = find_tables(readers)
        if self.source == "busy":
            check_revivable(_KEY, tables.values())
        self._names = list(tables)
        if self.source == "queries":
            _check_queries(
                counts_heads=usage.per_head is not None,
                engine_owns=engine_of(trainer) is not None,
                compiled=pl_module.config["model"]["compile"],
            )
            self._record_queries(trainer, readers)
        # The checkpoint of a rollback is written before `on_train_batch_start` could correct the history.
        self.history.go_back(trainer.global_step)

    def _record_queries(self, trainer: L.Trainer, readers: Mapping[str, Reader]) -> None:
        addressing = addressing_by_reader(f"{_KEY}.", readers)
        self._names += addressing
        self._recorder = QueryRecorder(addressing)
        # Queries are kept only where a revival follows: they take as much memory as an activation.
        self._recorder.begin(lambda: (trainer.global_step + 1) % self.every_n_steps == 0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Removes revivals that a rollback has undone from the history."""
        if trainer.global_step < self._last_step:
            self.history.go_back(trainer.global_step)
        self._last_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Logs the numbers of rows and sub-keys revived so far."""
        assert isinstance(pl_module, LanguageModule)
        if pl_module.log_is_due():
            pl_module.log_dict({f"{_LOGGED}/{name}": float(number) for name, number in self.revived.items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Revives slots after the update, before the checkpoint of the step is written."""
        counters, step = _slot_usage(trainer).counters, trainer.global_step
        # Before `Instability`, which is called later, may set the step counter back.
        self._last_step = step
        if counters is None or trainer.fit_loop._should_accumulate() or step % self.every_n_steps:
            return
        assert isinstance(pl_module, LanguageModule)
        tables, seed = pl_module.table_optimizer, pl_module.config["seed"]
        # Under an engine the tables have an optimizer of their own.
        states = [optimizer.state for optimizer in (*trainer.optimizers, *([] if tables is None else [tables]))]
        revival = Revival(counters, self.history, states, seed=seed, step=step, **self._limits)
        revival.revive(self._recorder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the recording of queries."""
        self._recorder.end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the recording of queries."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the history of revivals."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the history."""
        self.history.load_state_dict(state)


def _check_queries(*, counts_heads: bool, engine_owns: bool, compiled: bool) -> None:
    """Refuses what source=queries cannot work with: reads of sub-keys not counted, sub-keys or queries out of reach."""
    if not counts_heads:
        raise ConfigError(
            f"{_KEY}.source=queries needs callbacks.slot_usage.per_head=halves (or full), which counts the reads of "
            "sub-keys."
        )
    if engine_owns:
        raise ConfigError(
            f"{_KEY}.source=queries cannot write sub-keys that DeepSpeed's engine owns; set source=busy, which "
            "writes values only, or strategy=fsdp."
        )
    if compiled:
        raise ConfigError(
            f"{_KEY}.source=queries needs the queries inside a layer, which model.compile=true hides; set "
            f"{_KEY}.source=busy, or model.compile=false."
        )


def _slot_usage(trainer: L.Trainer) -> SlotUsage:
    usage = find_callback(trainer, SlotUsage)
    if usage is None:
        raise _missing_usage()
    return usage


def _missing_usage() -> ConfigError:
    return ConfigError(
        f"{_KEY} needs callbacks.slot_usage, which counts the reads; set callbacks=[default,slot_revival]."
    )
