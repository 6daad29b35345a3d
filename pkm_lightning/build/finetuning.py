"""Finetuning methods: what `finetune` names changes a built model before its weights are loaded, and acts in a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pkm_lightning.build.finetuning_method import FinetuningMethod
from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from pkm_lightning.model import Transformer

_OF_PACKAGE = ("Adapter", "Full", "LoRA", "SparseFinetuning")


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


def check_starting_weights(config: Mapping[str, Any]) -> None:
    """Refuses a method for a model whose weights are random.

    Raises:
        ConfigError: saying what gives a run trained weights.
    """
    described = config.get("finetune")
    if described and not config.get("init_from") and "_target_" not in config["model"]:
        raise ConfigError(
            f"{_shown(str(described.get('_target_')))} changes a trained model, and the weights of this run are "
            "random; set init_from=RUN, or model=hf model.path=FOLDER_OR_GGUF."
        )


def _shown(target: str) -> str:
    """Returns the override that chooses a method: that of its group, or of a class of the user's."""
    name = target.removeprefix("pkm_lightning.adaptation.")
    option = "sparse" if name == "SparseFinetuning" else name.lower()
    return f"finetune={option}" if name in _OF_PACKAGE else f"finetune._target_={target}"


def adapt(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Applies the method of `config`, if any, to a model that has been built."""
    method = finetuning_method(config)
    if method is not None:
        method.adapt(model)


def check_adapted(model: Transformer, config: Mapping[str, Any]) -> None:
    """Refuses a model that the method of `config`, if any, cannot train.

    Raises:
        ConfigError: as the method's `check`.
    """
    method = finetuning_method(config)
    if method is not None:
        method.check(model, config)


def finetuning_callbacks(config: Mapping[str, Any]) -> list[L.Callback]:
    """Returns the callbacks of the method of `config`; none without one."""
    method = finetuning_method(config)
    return [] if method is None else method.callbacks()
