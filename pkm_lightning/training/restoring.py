"""Rollback within a running training: restores weights, optimizers, schedule and step counter.

Data are not repeated: the loader continues where it is, and so do the counters of tokens and of slot usage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pkm_lightning.ops.ranks import local_shard

if TYPE_CHECKING:
    import lightning as L

    from pkm_lightning.training.module import LanguageModule


class HostSnapshot:
    """A copy of the training state in host memory, as large as a checkpoint; each rank copies its part.

    Args:
        trainer: the trainer, at the end of an optimizer step. Its strategy must not own the parameters.
        module: its module.
    """

    def __init__(self, trainer: L.Trainer, module: LanguageModule) -> None:
        self.step = trainer.global_step
        self._weights = {name: _copy(value) for name, value in _tensors(module).items()}
        self._optimizers = [_optimizer_state(optimizer) for optimizer in _optimizers(trainer, module)]
        self._schedules = _schedules(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scaler = None if scaler is None else scaler.state_dict()

    @torch.no_grad()
    def restore(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Restores this state; may be called any number of times."""
        for name, value in _tensors(module).items():
            local_shard(value).copy_(self._weights[name])
        for optimizer, (states, groups) in zip(_optimizers(trainer, module), self._optimizers, strict=True):
            # An optimizer makes its states in the first step, which may be abandoned.
            for parameter in [p for p in optimizer.state if p not in states]:
                del optimizer.state[parameter]
            for parameter, state in states.items():
                _fill(optimizer.state[parameter], state)
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                group.update(saved)
        _load_schedules(trainer, self._schedules)
        if self._scaler is not None:
            trainer.precision_plugin.scaler.load_state_dict(self._scaler)  # type: ignore[attr-defined]
        rewind(trainer, self.step)


def restore_checkpoint(trainer: L.Trainer, module: LanguageModule, path: Path) -> int:
    """Restores the state of a checkpoint of this run, and returns its step. Collective: call on all ranks."""
    strategy = trainer.strategy
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state_dict(checkpoint)
    _load_schedules(trainer, checkpoint["lr_schedulers"])
    if checkpoint.get("MixedPrecision"):
        trainer.precision_plugin.load_state_dict(checkpoint["MixedPrecision"])
    step = int(checkpoint["global_step"])
    rewind(trainer, step)
    return step


def rewind(trainer: L.Trainer, step: int) -> None:
    """Sets the counter of optimizer steps, `trainer.global_step`, and that of the loggers; call at a batch's end."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.automatic_optimization.optim_progress.optimizer.step
    n_undone = progress.total.completed - step
    for counter in (progress.total, progress.current):
        counter.completed -= n_undone
        counter.ready -= n_undone
    # Lightning 2.6 adds this batch to the count after its hooks.
    loop._batches_that_stepped = step - 1


def scale_learning_rates(trainer: L.Trainer, factor: float) -> None:
    """Multiplies the learning rate of every group, now and for the rest of the schedule."""
    for configured in trainer.lr_scheduler_configs:
        scheduler: Any = configured.scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]
        for group in scheduler.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor


def _tensors(module: LanguageModule) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, those of tables included."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _optimizers(trainer: L.Trainer, module: LanguageModule) -> list[Optimizer]:
    tables = [] if module.table_optimizer is None else [module.table_optimizer]
    return [*trainer.optimizers, *tables]


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    states = {
        parameter: {key: _copy(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return states, groups


def _copy(value: Tensor) -> Tensor:
    return local_shard(value.detach()).to("cpu", copy=True)


def _fill(state: dict[str, Any], saved: dict[str, Any]) -> None:
    # In place, so that a DTensor keeps its layout.
    for key, value in saved.items():
        if isinstance(value, Tensor):
            local_shard(state[key]).copy_(value)
        else:
            state[key] = value


def _schedules(trainer: L.Trainer) -> list[dict[str, Any]]:
    return [dict(configured.scheduler.state_dict()) for configured in trainer.lr_scheduler_configs]


def _load_schedules(trainer: L.Trainer, states: list[dict[str, Any]]) -> None:
    for configured, state in zip(trainer.lr_scheduler_configs, states, strict=True):
        configured.scheduler.load_state_dict(dict(state))
