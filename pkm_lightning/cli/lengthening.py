"""A run that is continued with another `trainer.max_steps` follows the schedule of the new length from there on.

The rate of every step is a function of the configuration alone: of a run of that length with the same warm-up. What has
been trained is exactly such a run's beginning as long as its rate was, too: a wsd run before its decay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from pkm_lightning.build.schedule import configured_schedule, decay_start, warmup_steps
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.errors import RunDirectoryError, check_integer

_log = logging.getLogger(__name__)


def checkpoint_to_continue(latest: Path, max_steps: object) -> Path:
    """Returns the checkpoint that a run of `max_steps` steps continues from: the latest, or that from before its decay.

    A wsd run that becomes longer goes back to the latter if it is kept, since its decay belongs to the shorter run.
    """
    config = open_checkpoint(latest).config
    optim, before = config["optim"], int(config["trainer"]["max_steps"])
    if optim["schedule"] != "wsd" or not isinstance(max_steps, int) or max_steps <= before:
        return latest
    kept = latest.with_name(f"step-{decay_start(optim, before):08d}.ckpt")
    return kept if kept.exists() and kept.name < latest.name else latest


def with_length(saved: Mapping[str, Any], max_steps: Any, *, step: int) -> dict[str, Any]:
    """Returns the saved configuration with another `trainer.max_steps` and the warm-up that the run has had.

    Args:
        saved: the saved configuration.
        max_steps: the new length, in optimizer steps; the saved one and `auto` change nothing.
        step: optimizer steps that the run has made.

    Raises:
        RunDirectoryError: the run has made more steps already.
        ConfigError: no number of steps.
    """
    if max_steps == "auto":
        return dict(saved)
    check_integer("trainer.max_steps", max_steps, low=1)
    before = int(saved["trainer"]["max_steps"])
    if max_steps == before:
        return dict(saved)
    if max_steps < step:
        raise RunDirectoryError(
            f"trainer.max_steps={max_steps} is less than the {step} steps that run_dir={saved['run_dir']} has made; "
            f"set {step} or more."
        )
    optim = {**saved["optim"], "warmup_steps": min(warmup_steps(saved["optim"], before), max_steps)}
    return {**saved, "optim": optim, "trainer": {**saved["trainer"], "max_steps": max_steps}}


def describe_length(saved: Mapping[str, Any], new: Mapping[str, Any], *, step: int, undone: int = 0) -> str | None:
    """Returns what another length does to the learning rate, in one sentence; None if the length is the same.

    Args:
        saved, new: configurations of the run with the old and the new length.
        step: optimizer steps in the checkpoint that the run continues from.
        undone: steps that it has made beyond them.
    """
    before, after = int(saved["trainer"]["max_steps"]), int(new["trainer"]["max_steps"])
    if before == after:
        return None
    optim, lengths = new["optim"], f"trainer.max_steps={after} (was {before})"
    trained, ahead = configured_schedule(optim, before), configured_schedule(optim, after)
    # The schedules have one warm-up and one peak, so that they part where the first of them begins to fall.
    if step <= min(decay_start(optim, before), decay_start(optim, after)) + 1:
        undoes = f"; the {undone} steps after step {step}, in which the rate fell, are trained anew" if undone else ""
        return f"{lengths}: the rate has not begun to fall; the run continues exactly like one of {after} steps{undoes}"
    last, following = optim["lr"] * trained(step - 1), optim["lr"] * ahead(step)
    return (
        f"{lengths}: optim.schedule={optim['schedule']} had brought optim.lr to {last:.3g} at step {step}; from here "
        f"on it is that of a run of {after} steps, which begins with {following:.3g}"
    )


def is_lengthened(checkpoint: Path, config: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint of the run was written while it had another length."""
    return bool(open_checkpoint(checkpoint).config["trainer"]["max_steps"] != config["trainer"]["max_steps"])


class LengthenedSchedule(L.Callback):
    """Sets the rate of the next step by the schedule of the new length: the checkpoint holds that of the old one.

    Checkpoints of later steps, if the run has gone back to one from before its decay, are of another run and removed.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets the rates of all groups. Collective: call on all ranks."""
        for configured in trainer.lr_scheduler_configs:
            schedule: Any = configured.scheduler
            factor = schedule.lr_lambdas[0](schedule.last_epoch)
            schedule._last_lr = [rate * factor for rate in schedule.base_lrs]
            for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepCheckpoint):
                callback.replace_later(trainer)
