"""Checkpoints from which a killed run continues exactly: every n optimizer steps, and when the run is asked to stop.

Where a validation follows a step, the checkpoint waits for it; otherwise a resumed run would lack that validation's row
in metrics.csv.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pkm_lightning.build.schedule import decay_start
from pkm_lightning.errors import check_flag, check_integer

__all__ = ["RunInterrupted", "StepCheckpoint"]


class RunInterrupted(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class StepCheckpoint(ModelCheckpoint):
    """Writer of checkpoints named like `step-00000500.ckpt`; only the latest is kept, the end of training included.

    With `optim.schedule=wsd` the one from before the decay may stay, from which a longer run continues exactly.
    After `request_stop`, called for instance by a signal handler, the step under way is saved and `RunInterrupted`
    raised.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between checkpoints.
        asynchronous: write from a copy in host memory, while training continues.
        keep_before_decay: also write the last step before the rate of a wsd schedule falls, and keep it.
    """

    def __init__(
        self, *, dirpath: str, every_n_steps: int, asynchronous: bool = False, keep_before_decay: bool = True
    ) -> None:
        check_flag("callbacks.step_checkpoint.asynchronous", asynchronous)
        check_flag("callbacks.step_checkpoint.keep_before_decay", keep_before_decay)
        self._keeps = keep_before_decay
        self._kept_step: int | None = None
        self.asynchronous = asynchronous
        check_integer("callbacks.step_checkpoint.every_n_steps", every_n_steps, low=1)
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            # A step that is saved again, after a rollback, replaces its file.
            enable_version_counter=False,
        )
        self._due = False
        self._stop_reason: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the step before the decay, as ModelCheckpoint finds its folder."""
        super().setup(trainer, pl_module, stage)
        config = getattr(pl_module, "config", None)
        if self._keeps and config is not None and config["optim"]["schedule"] == "wsd":
            self._kept_step = decay_start(config["optim"], int(config["trainer"]["max_steps"])) or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the files in the folder are the state, also where Lightning would warn of a moved one."""

    def request_stop(self, reason: str) -> None:
        """Requests a checkpoint and a stop for a signal of the name `reason`; safe in a signal handler."""
        self._stop_reason = reason

    def stop_if_requested(self, trainer: L.Trainer) -> None:
        """Ends a run that was asked to stop after its last step. Collective: call on all ranks.

        Raises:
            RunInterrupted: with the name of the signal.
            KeyboardInterrupt: the same, where the signal has reached this rank too late for the others to know of it.
        """
        if self._stop_is_agreed(trainer):
            raise RunInterrupted(self._stop_reason)
        if self._stop_reason is not None:
            raise KeyboardInterrupt(self._stop_reason)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Returns whether this step ends an interval, the same on all ranks; a requested stop does not count."""
        return trainer.global_step % self._every_n_train_steps == 0 or trainer.global_step == self._kept_step

    def newest(self, trainer: L.Trainer) -> Path | None:
        """Returns the last checkpoint on disk, None before the first. Collective: call on all ranks."""
        self._finish(trainer)
        complete = sorted(Path(str(self.dirpath)).glob("step-*.ckpt"))
        # The ranks may see different states of a shared file system.
        newest: Path | None = trainer.strategy.broadcast(complete[-1] if complete else None)
        return newest

    def replace_later(self, trainer: L.Trainer) -> None:
        """Saves the earlier step that training has returned to, and removes the checkpoints of later steps."""
        self._finish(trainer)
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._finish(trainer)
        if trainer.is_global_zero:
            here = f"step-{trainer.global_step:08d}.ckpt"
            for later in (path for path in Path(str(self.dirpath)).glob("step-*.ckpt") if path.name > here):
                _remove(later)
        self._remove_older(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Saves after the last micro-batch of a step that is due, unless a validation comes first."""
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return
        stopping = self._stop_is_agreed(trainer)
        self._due = stopping or self.is_due(trainer)
        if self._due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._save_due(trainer, stopping)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the step whose checkpoint has waited for this validation."""
        if trainer.state.fn == "fit" and self._due:
            self._save_due(trainer, self._stop_is_agreed(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step, if it is not saved yet."""
        # The process may end right after, so background writes must be complete.
        self._save_step(trainer)
        self._finish(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Does nothing, where Lightning would save: epochs do not matter."""

    def _save_due(self, trainer: L.Trainer, stopping: bool) -> None:
        self._due = False
        self._save_step(trainer)
        if stopping:
            self._finish(trainer)
            raise RunInterrupted(self._stop_reason)

    def _save_step(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved == trainer.global_step:
            return
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._remove_older(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        """Waits for the checkpoint that is being written in the background."""
        if self.asynchronous:
            strategy: Any = trainer.strategy
            strategy.finish_saving() if hasattr(strategy, "finish_saving") else strategy.checkpoint_io.teardown()
            self._remove_older(trainer)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Does nothing: the previous checkpoint stays until the new one is complete, see `_remove_older`."""

    def _remove_older(self, trainer: L.Trainer) -> None:
        folder = Path(str(self.dirpath))
        complete = sorted(folder.glob("step-*.ckpt"))
        if not trainer.is_global_zero or not complete:
            return
        # A killed run leaves an older or half-written one behind; a later one may be in the course of being written.
        unfinished = [p for p in folder.glob("step-*.ckpt.tmp") if p.name.removesuffix(".tmp") <= complete[-1].name]
        for older in (*complete[:-1], *unfinished):
            if self._kept_step is None or older.name != f"step-{self._kept_step:08d}.ckpt":
                _remove(older)

    def _stop_is_agreed(self, trainer: L.Trainer) -> bool:
        """Returns whether any rank was asked to stop, the same on all ranks."""
        if trainer.world_size == 1:
            return self._stop_reason is not None
        # Ranks that stop at different steps would wait for each other for ever. The votes name the signal, which may
        # have reached one rank only, and by which all of them end.
        vote = 0 if self._stop_reason is None else signal.Signals[self._stop_reason].value
        votes = torch.tensor(float(vote), device=trainer.strategy.root_device)
        agreed = int(trainer.strategy.reduce(votes, reduce_op="max"))
        if agreed:
            self._stop_reason = signal.Signals(agreed).name
        return agreed > 0


def _remove(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True) if checkpoint.is_dir() else checkpoint.unlink(missing_ok=True)
