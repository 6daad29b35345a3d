"""Checkpoints that a killed run continues from exactly, every n optimizer steps and when the run is asked to stop.

Where a validation follows a step, the checkpoint waits for it: else a resumed run would lack that validation's row.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pkm_lightning.errors import check_flag, check_integer


class RunInterrupted(Exception):
    """Raised after a checkpoint was written because the run was asked to stop."""


class StepCheckpoint(ModelCheckpoint):
    """Keeps the latest checkpoint, `step-00000500.ckpt`, and writes one at the end of training.

    `request_stop` (from a signal handler, say) saves at the end of the step under way and raises `RunInterrupted`.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between checkpoints.
        asynchronous: training goes on from a copy in host memory while a checkpoint is written.
    """

    def __init__(self, *, dirpath: str, every_n_steps: int, asynchronous: bool = False) -> None:
        check_flag("callbacks.step_checkpoint.asynchronous", asynchronous)
        self.asynchronous = asynchronous
        check_integer("callbacks.step_checkpoint.every_n_steps", every_n_steps, low=1)
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._due = False
        self._stop_reason: str | None = None

    def request_stop(self, reason: str) -> None:
        """Asks for a checkpoint and a stop; safe in a signal handler."""
        self._stop_reason = reason

    def is_due(self, trainer: L.Trainer) -> bool:
        """The step that has just been made will be saved, as every rank knows; not so a stop that one was asked for."""
        return trainer.global_step % self._every_n_train_steps == 0

    def newest(self, trainer: L.Trainer) -> Path | None:
        """The last checkpoint on disk, the same on every rank; None before the first."""
        self._finish(trainer)
        whole = sorted(Path(str(self.dirpath)).glob("step-*.ckpt"))
        found: Path | None = trainer.strategy.broadcast(whole[-1] if whole else None)
        return found

    def went_back(self, trainer: L.Trainer) -> None:
        """Training has returned to an earlier step: saves it, and removes what was saved of later ones."""
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
        """Saves what has waited for the validation."""
        if trainer.state.fn == "fit" and self._due:
            self._save_due(trainer, self._stop_is_agreed(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of training, if it is not saved yet."""
        self._save_step(trainer)
        self._finish(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Epochs do not matter."""

    def _save_due(self, trainer: L.Trainer, stopping: bool) -> None:
        self._due = False
        self._save_step(trainer)
        if stopping:
            self._finish(trainer)
            raise RunInterrupted(self._stop_reason or "asked to stop")

    def _save_step(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved == trainer.global_step:
            return
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._remove_older(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        """Waits for what is being written in the background."""
        if self.asynchronous:
            strategy: Any = trainer.strategy
            strategy.finish_saving() if hasattr(strategy, "finish_saving") else strategy.checkpoint_io.teardown()
            self._remove_older(trainer)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """The one before stays until the new one is whole."""

    def _remove_older(self, trainer: L.Trainer) -> None:
        folder = Path(str(self.dirpath))
        whole = sorted(folder.glob("step-*.ckpt"))
        if not trainer.is_global_zero or not whole:
            return
        # A killed run leaves an older one behind, or one half-written; a later one may be being written right now.
        unfinished = [p for p in folder.glob("step-*.ckpt.tmp") if p.name.removesuffix(".tmp") <= whole[-1].name]
        for older in (*whole[:-1], *unfinished):
            _remove(older)

    def _stop_is_agreed(self, trainer: L.Trainer) -> bool:
        """True on every rank if any rank was asked: ranks that stop at different steps would wait for ever."""
        asked = self._stop_reason is not None
        if trainer.world_size == 1:
            return asked
        votes = torch.tensor(float(asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(votes, reduce_op="sum") > 0)


def _remove(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True) if checkpoint.is_dir() else checkpoint.unlink(missing_ok=True)
