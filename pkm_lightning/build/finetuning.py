"""Finetuning methods: what `finetune` names changes a built model before its weights are loaded, and acts in a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pkm_lightning.build.instantiate import check_kind, instantiate

if TYPE_CHECKING:
    import lightning as L
    from torch import nn


@runtime_checkable
class FinetuningMethod(Protocol):
    """The contract of a class that `finetune._target_` names."""

    def adapt(self, model: nn.Module) -> None:
        """Changes a trunk before it gets its weights: parameters are frozen, or added for every later use of the run."""

    def callbacks(self) -> list[L.Callback]:
        """Returns what acts while the run is trained."""


def finetuning_method(config: Mapping[str, Any]) -> FinetuningMethod | None:
    """Returns the method that `finetune` names; None for none, and for runs of versions without this group.

    Raises:
        ConfigError: a class that is no method, or arguments that it refuses.
    """
    described = config.get("finetune")
    if not described:
        return None
    method = instantiate(described, "finetune")
    check_kind(method, FinetuningMethod, described, "finetune")
    return method


def adapt(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Applies the method of `config`, if any, to a model that has been built."""
    method = finetuning_method(config)
    if method is not None:
        method.adapt(model)


def finetuning_callbacks(config: Mapping[str, Any]) -> list[L.Callback]:
    """Returns the callbacks of the method of `config`; none without one."""
    method = finetuning_method(config)
    return [] if method is None else method.callbacks()
