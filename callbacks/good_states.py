"""The states that training can go back to: copies in host memory, or the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from pkm_lightning.callbacks.base import find_callback
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.errors import InstabilityError
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.restoring import HostSnapshot, restore_checkpoint, scale_learning_rates


class GoodStates:
    """Keeper of states of the training under way, which restores the newest one that has proved good.

    Args:
        restore: `memory` (copies in host memory, of two states, each as large as a checkpoint) or `disk` (the last
            checkpoint).
        every_n_steps: steps between states in memory.
        settle_steps: further steps after which a state in memory counts as good, at most `every_n_steps`: damage to the
            weights may take some steps to show.
    """

    def __init__(self, restore: str, every_n_steps: int, settle_steps: int) -> None:
        self.restore, self.every_n_steps, self.settle_steps = restore, every_n_steps, settle_steps
        self._states: list[HostSnapshot] = []

    def begin(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Keeps the state that training starts from."""
        if self.restore == "memory":
            self._states = [HostSnapshot(trainer, pl_module)]

    def is_due(self, trainer: L.Trainer) -> bool:
        """Returns whether the state of this step is to be kept, provided it is good."""
        on_time = trainer.global_step % self.every_n_steps == 0
        return self.restore == "memory" and on_time and trainer.global_step > self._states[-1].step

    def keep(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Keeps the state of this step; the previous one stays until this one has proved good."""
        # Two are enough: the older one is good until the newer one has settled.
        self._states = [self._states[-1], HostSnapshot(trainer, pl_module)]

    def forget(self) -> None:
        """Frees the memory."""
        self._states = []

    def newest(self, trainer: L.Trainer) -> int | None:
        """Returns the step of the state that a rollback would restore; None: there is no state yet."""
        if self.restore == "disk":
            path = _step_checkpoint(trainer).newest(trainer)
            return None if path is None else int(path.stem.removeprefix("step-"))
        return self._good(trainer).step

    def go_back(self, trainer: L.Trainer, pl_module: LanguageModule, lr_factor: float) -> None:
        """Restores the newest good state, and multiplies the learning rate by `lr_factor`.

        Raises:
            InstabilityError: there is no checkpoint yet.
        """
        scale = _rate_scale(trainer, pl_module)
        if self.restore == "disk":
            path = _step_checkpoint(trainer).newest(trainer)
            if path is None:
                raise InstabilityError(
                    "there is no checkpoint to go back to yet; lower callbacks.step_checkpoint.every_n_steps, or set "
                    "callbacks.instability.restore=memory."
                )
            restore_checkpoint(trainer, pl_module, path)
        else:
            state = self._good(trainer)
            state.restore(trainer, pl_module)
            # The other state is of the abandoned steps.
            self._states = [state]
        # The restored schedule may be older than an earlier reduction of the rate, which must last.
        factor = scale * lr_factor / _rate_scale(trainer, pl_module)
        if factor != 1:
            scale_learning_rates(trainer, factor)
        checkpoints = find_callback(trainer, StepCheckpoint)
        if checkpoints is not None:
            checkpoints.replace_later(trainer)

    def _good(self, trainer: L.Trainer) -> HostSnapshot:
        # Before the second state has settled, the first one is the best there is.
        settled = [state for state in self._states if trainer.global_step - state.step > self.settle_steps]
        return (settled or self._states[:1])[-1]


def will_save(trainer: L.Trainer) -> bool:
    """Returns whether a checkpoint of the step that has just been made will follow, as all ranks know."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(callback.is_due(trainer) for callback in callbacks if isinstance(callback, StepCheckpoint))


def newest_in_words(trainer: L.Trainer) -> str:
    """Returns, for an error message, the checkpoint that the run can be continued from, as far as this rank knows."""
    checkpoints = find_callback(trainer, StepCheckpoint)
    names = [] if checkpoints is None else sorted(p.name for p in Path(str(checkpoints.dirpath)).glob("step-*.ckpt"))
    return f"its last checkpoint is {names[-1]}" if names else "there is no checkpoint yet"


def _rate_scale(trainer: L.Trainer, pl_module: LanguageModule) -> float:
    """Returns the peak of the schedule over the configured one: below 1 after rollbacks that have lowered it."""
    schedule = trainer.lr_scheduler_configs[0].scheduler
    return float(schedule.base_lrs[0]) / pl_module.config["optim"]["lr"] if pl_module.config["optim"]["lr"] else 1.0


def _step_checkpoint(trainer: L.Trainer) -> StepCheckpoint:
    callback = find_callback(trainer, StepCheckpoint)
    assert callback is not None
    return callback
