"""The states that training can go back to: copies in host memory, or the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.errors import InstabilityError
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.restoring import MemoryState, lower_rate, restore_checkpoint


class GoodStates:
    """Takes states as training goes on, and restores the newest that has proved good.

    Args:
        restore: `memory` or `disk`.
        every_n_steps: steps between states in memory.
        settle_steps: a state is good after as many further steps.
    """

    def __init__(self, restore: str, every_n_steps: int, settle_steps: int) -> None:
        self.restore, self.every_n_steps, self.settle_steps = restore, every_n_steps, settle_steps
        self._states: list[MemoryState] = []

    def begin(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """The first state is that which training starts from."""
        if self.restore == "memory":
            self._states = [MemoryState(trainer, pl_module)]

    def is_due(self, trainer: L.Trainer) -> bool:
        """The state of this step is to be kept, if it is good."""
        on_time = trainer.global_step % self.every_n_steps == 0
        return self.restore == "memory" and on_time and trainer.global_step > self._states[-1].step

    def keep(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Keeps the state of this step; the one before stays, until this one has proved good."""
        self._states = [self._states[-1], MemoryState(trainer, pl_module)]

    def forget(self) -> None:
        """Frees the memory."""
        self._states = []

    def newest(self, trainer: L.Trainer) -> int | None:
        """The step that would be gone back to; None: there is none."""
        if self.restore == "disk":
            path = _newest_checkpoint(trainer)
            return None if path is None else int(path.stem.removeprefix("step-"))
        return self._good(trainer).step

    def go_back(self, trainer: L.Trainer, pl_module: LanguageModule, lr_factor: float) -> None:
        """Restores, and multiplies the learning rate.

        Raises:
            InstabilityError: there is no checkpoint yet.
        """
        rate = _rate(trainer, pl_module)
        if self.restore == "disk":
            path = _newest_checkpoint(trainer)
            if path is None:
                raise InstabilityError(
                    "there is no checkpoint to go back to yet; lower callbacks.step_checkpoint.every_n_steps, or say "
                    "callbacks.instability.restore=memory."
                )
            restore_checkpoint(trainer, pl_module, path)
        else:
            state = self._good(trainer)
            state.restore(trainer, pl_module)
            self._states = [state]
        # The state may be older than an earlier lowering.
        factor = rate * lr_factor / _rate(trainer, pl_module)
        if factor != 1:
            lower_rate(trainer, factor)
        checkpoints = _checkpoints(trainer)
        if checkpoints is not None:
            checkpoints.went_back(trainer)

    def _good(self, trainer: L.Trainer) -> MemoryState:
        settled = [state for state in self._states if trainer.global_step - state.step > self.settle_steps]
        return (settled or self._states[:1])[-1]


def _rate(trainer: L.Trainer, pl_module: LanguageModule) -> float:
    """The schedule's peak over the configured one: below 1 after rollbacks that have lowered it."""
    schedule = trainer.lr_scheduler_configs[0].scheduler
    return float(schedule.base_lrs[0]) / pl_module.config["optim"]["lr"] if pl_module.config["optim"]["lr"] else 1.0


def _checkpoints(trainer: L.Trainer) -> StepCheckpoint | None:
    return next((c for c in trainer.callbacks if isinstance(c, StepCheckpoint)), None)  # type: ignore[attr-defined]


def _newest_checkpoint(trainer: L.Trainer) -> Path | None:
    callback = _checkpoints(trainer)
    assert callback is not None
    return callback.newest(trainer)
