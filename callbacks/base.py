"""The contract of a callback, and what several callbacks share.

A callback is a `lightning.Callback` whose constructor takes keywords only, one for each key of its YAML. It may define:

| member | called | contract |
|---|---|---|
| `check(config)` | once, before anything is built or written | see `ChecksConfig` |
| `hook_order` | class attribute, 0 if missing | callbacks are called by rising order, equal ones as configured: |
| | | `MetricsCSV` (1) writes what the others log, `Instability` (2) may go back to an earlier step |
| Lightning's hooks | on all ranks | no device value is read unless a log is due |
| `state_dict()` | on all ranks, when a checkpoint is written | plain values and tensors; collectives are allowed |
| `load_state_dict(state)` | on all ranks, before `on_train_start` of a resumed run | the model may not be built yet |

`pl_module`, a `LanguageModule`, offers to the hooks of training:

| member | contract |
|---|---|
| `log_is_due()` | True in the last micro-batch of a step that logs, before and after the update |
| `log`, `log_dict` | metrics named `train/...`, in `on_before_optimizer_step` or `on_train_batch_end` of such a step |
| `watch.watchers` | functions of (traces, batch), called once per micro-batch after its forward, even if activations |
| | are recomputed; while there are any, plugins fill their traces: `FFNOutput.trace` by layer |
| `watch.judges` | functions of (figures), called once per step after its last backward and before the update; a False |
| | refuses the step. All ranks must return the same |
| `watch.figures` | scalars of the step by name, `loss`, `grad_norm_dense`, `grad_norm_table`: when a log is due, or |
| | in every step while there are judges |
| `tokens_seen` | real input tokens so far over all ranks, a scalar tensor |

A callback appends its watchers and judges in `on_train_start` and removes them in `on_train_end` and `on_exception`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import lightning as L
from torch import nn

from pkm_lightning.build.checks import ChecksConfig as ChecksConfig
from pkm_lightning.build.instantiate import target_class

C = TypeVar("C", bound=L.Callback)


def find_callback(trainer: L.Trainer, cls: type[C]) -> C | None:
    """Returns the first callback of class `cls` that `trainer` has."""
    # Lightning 2.6 sets this attribute without declaring it.
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, cls)), None)


def configured(config: Mapping[str, Any], cls: type[L.Callback]) -> list[Mapping[str, Any]]:
    """Returns the entries of `config.callbacks` that describe a `cls`, whatever their keys are."""
    entries = {key: entry for key, entry in (config["callbacks"] or {}).items() if entry}
    return [entry for key, entry in entries.items() if issubclass(target_class(entry, f"callbacks.{key}"), cls)]


def engine_owns_parameters(config: Mapping[str, Any]) -> bool:
    """Returns whether the configured strategy is one whose engine holds parameters and optimizer states itself."""
    # From the class, before there is an object; see `pkm_lightning.training.engine.Engine`.
    strategy = config["strategy"]
    return bool(strategy) and bool(getattr(target_class(strategy, "strategy"), "owns_parameters", False))


def in_training(trainer: L.Trainer) -> bool:
    """Returns whether a fit runs, its validations included but for the one that precedes training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switches to evaluation, and back for those parts that were in training: a frozen one may not have been."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
