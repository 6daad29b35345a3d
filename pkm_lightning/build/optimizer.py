"""The optimizer of `optim.optimizer`, and what no training here can do with one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.errors import ConfigError


def make_optimizer(described: Mapping[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    """Makes the optimizer that `described`, the configuration of `optim.optimizer`, names, over parameter groups.

    Raises:
        ConfigError: with the reason of the class, where it refuses its arguments or the groups.
    """
    try:
        optimizer = instantiate(described, "optim.optimizer", params=groups)
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ConfigError(f"optim.optimizer: {reason}.") from None
    check_kind(optimizer, Optimizer, described, "optim.optimizer")
    return optimizer


def check_optimizer(optim: Mapping[str, Any]) -> None:
    """Refuses what the class of `optim.optimizer` itself refuses, and classes that cannot train a model here.

    Raises:
        ConfigError: with the optimizer's reason, or naming one that works.
    """
    # Groups as a model has them: some classes take one only, others look for matrices.
    described, decays = optim["optimizer"], {"matrix": optim["weight_decay"], "gain": 0.0}
    shapes = {"matrix": (2, 2), "gain": (2,)}
    trial = [
        {"name": n, "params": [torch.nn.Parameter(torch.zeros(shapes[n]))], "lr": optim["lr"], "weight_decay": decay}
        for n, decay in decays.items()
    ]
    cls = type(make_optimizer(described, trial))
    problem = None
    if issubclass(cls, torch.optim.SparseAdam):
        problem = "takes sparse gradients only, and those of a model are dense"
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        problem = "evaluates the loss several times per step, which is not offered"
    if problem:
        raise ConfigError(
            f"optim.optimizer._target_={described['_target_']} {problem}; set another, such as torch.optim.AdamW."
        )
