"""Gives slots that nobody has read for long another start. Off by default; needs `slot_usage`.

A row is read where its keys lead, so new values alone bring no read; they make the next one useful. Two sources:

- `busy`: each dead row (of a table; dead for all layers that share it) becomes a copy of one of the most-read rows of
  SlotUsage's window, plus noise. Keys stay. Works with every memory and strategy.
- `queries`: a product-key slot (i, j) has no key of its own, so what is moved are dead sub-keys: those that no query
  of their head has chosen for `dead_after` steps, in whatever pair. Each goes to where the worst-served query half of
  the micro-batch at hand points (on rank 0; see `pkm_lightning.memory.revival`), plus noise; then the dead rows
  among the S pairs of each moved sub-key get values as from `busy`. Live slots never change.

What the optimizer remembers of a row or sub-key is forgotten. At most `max_share` of a table's rows, and of the
sub-keys of a half, change at a time (rounded up), the longest unread first. Random numbers depend on the seed, the step
and the name only, and rows are chosen by sums over the ranks: all ranks agree, however tables are split. What was
revived has `dead_after` steps to find readers before its next turn; SlotUsage's `dead` counts it until it is read. A
rollback undoes revivals with the values, and what is known of them.

Metrics, at each log, since the start: `train/revived/NAME`, rows of `table0`, sub-keys of `layer3.slot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from pkm_lightning.callbacks.revival_checks import check_config, check_queries, missing_usage
from pkm_lightning.callbacks.slot_usage import SlotUsage
from pkm_lightning.callbacks.stopwatch import step_will_log
from pkm_lightning.errors import ConfigError, check_choice, check_integer, check_range
from pkm_lightning.memory.addressing import Addressing
from pkm_lightning.training import LanguageModule
from pkm_lightning.usage.revival import Revival, addressing_of, learns
from pkm_lightning.usage.revival_history import RevivalHistory
from pkm_lightning.usage.slot_readers import find_readers, find_tables

_KEY = "callbacks.slot_revival"


class SlotRevival(L.Callback):
    """Revives dead slots every `every_n_steps`. Its state is what was revived when.

    Args:
        every_n_steps: optimizer steps between revivals, 1 or more.
        dead_after: steps without a read after which a slot is dead, 1 or more.
        max_share: largest share of a table's rows (and of a half's sub-keys) that changes at a time, 0 to 1.
        source: `busy` or `queries`.
        noise: standard deviation of what is added, over the RMS of the row or sub-key.

    Raises:
        ConfigError: a value out of range; when training starts, a setting that it cannot work with.
    """

    def __init__(self, *, every_n_steps: int, dead_after: int, max_share: float, source: str, noise: float) -> None:
        check_integer(f"{_KEY}.every_n_steps", every_n_steps, low=1)
        check_integer(f"{_KEY}.dead_after", dead_after, low=1)
        check_range(f"{_KEY}.max_share", max_share, 0, 1)
        check_choice(f"{_KEY}.source", source, ("busy", "queries"))
        check_range(f"{_KEY}.noise", noise, 0)
        self.every_n_steps, self.dead_after, self.max_share = every_n_steps, dead_after, max_share
        self.source, self.noise = source, noise
        self.history = RevivalHistory()
        self._names: list[str] = []
        self._reached = 0
        self._addressing: dict[str, Addressing] = {}
        self._queries: dict[str, Tensor] = {}
        self._valid_T: Tensor | None = None
        self._hooks: list[Any] = []

    @property
    def revived(self) -> dict[str, int]:
        """Rows and sub-keys revived so far, by name."""
        return dict.fromkeys(self._names, 0) | self.history.counts

    def state_dict(self) -> dict[str, Any]:
        """What was revived when."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.history.load_state_dict(state)

    # --- what it works with

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what cannot work; watches queries, where they are wanted."""
        assert isinstance(pl_module, LanguageModule)
        usage = _slot_usage(trainer)
        readers = find_readers(pl_module.model)
        tables = find_tables(readers)
        tables_learn = any(learns(table) for one in tables.values() for table in one.tables)
        if self.source == "busy" and not tables_learn:
            raise ConfigError(f"{_KEY}: no table of this model learns, so there is nothing to revive; leave it out.")
        self._names = list(tables)
        if self.source == "queries":
            check_queries(
                counts_heads=usage.per_head is not None,
                engine_owns=getattr(trainer.strategy, "owns_parameters", False),
                compiled=pl_module.config["model"]["compile"],
            )
            found = {name: addressing_of(reader.plugin) for name, reader in readers.items() if reader.slots.n_keys}
            self._addressing = {name: one for name, one in found.items() if one is not None}
            if not self._addressing:
                raise ConfigError(
                    f"{_KEY}.source=queries moves the sub-keys of product keys (ffn=pkm, memory, memory_plus, peer), "
                    "and this model has none; set source=busy."
                )
            self._names += self._addressing
            self._watch_queries(trainer, pl_module)
        # A checkpoint of a rollback is written before the next batch starts.
        self.history.go_back(trainer.global_step)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses what cannot work with the rest of a configuration, before anything starts.

        Raises:
            ConfigError: slot_usage is off; or source=queries with what hides reads, queries or sub-keys.
        """
        check_config(config, self.source)

    def _watch_queries(self, trainer: L.Trainer, module: LanguageModule) -> None:
        def hook_of(name: str) -> Any:
            def keep(query: torch.nn.Module, _: Any, output: tuple[Tensor, Any]) -> None:
                if query.training and (trainer.global_step + 1) % self.every_n_steps == 0:
                    self._queries[name] = output[0].detach()

            return keep

        self._hooks = [one.query.register_forward_hook(hook_of(name)) for name, one in self._addressing.items()]
        module.watch.watchers.append(self._keep_valid)

    def _keep_valid(self, _: Any, batch: dict[str, Tensor]) -> None:
        self._valid_T = batch["valid"].flatten() if "valid" in batch else None

    # --- the revival

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Forgets revivals that a rollback has undone."""
        if trainer.global_step < self._reached:
            self.history.go_back(trainer.global_step)
        self._reached = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Logs how many were revived so far."""
        if step_will_log(trainer):
            pl_module.log_dict({f"train/revived/{name}": float(n) for name, n in self.revived.items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Revives after the update, before the checkpoint of the step is written."""
        counters, step = _slot_usage(trainer).counters, trainer.global_step
        self._reached = step
        if counters is None or trainer.fit_loop._should_accumulate() or step % self.every_n_steps:
            return
        assert isinstance(pl_module, LanguageModule)
        apart = pl_module.table_optimizer
        states = [optimizer.state for optimizer in (*trainer.optimizers, *([] if apart is None else [apart]))]
        revival = Revival(
            counters=counters,
            history=self.history,
            states=states,
            dead_after=self.dead_after,
            max_share=self.max_share,
            noise=self.noise,
            seed=pl_module.config["seed"],
            step=step,
        )
        reached = {}
        for name, addressing in self._addressing.items():
            reached[name] = revival.keys(name, addressing, self._queries[name], self._valid_T)
        for name, tables in counters.tables.items():
            within = [reached[reader] for reader in tables.readers if reader in reached]
            if self.source == "busy" or within:
                revival.rows(name, torch.stack(within).any(0) if within else None)
        self._queries.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets go of the queries."""
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Here too."""
        self._stop(pl_module)

    def _stop(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        while self._hooks:
            self._hooks.pop().remove()
            pl_module.watch.watchers[:] = [w for w in pl_module.watch.watchers if w is not self._keep_valid]


def _slot_usage(trainer: L.Trainer) -> SlotUsage:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SlotUsage):
            return callback
    raise missing_usage()
