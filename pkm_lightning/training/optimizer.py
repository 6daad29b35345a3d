"""Optimizer groups by what a parameter is, as its module declares; learning-rate schedules over `max_steps`.

| role      | learning rate        | weight decay         |
|-----------|----------------------|----------------------|
| matrix    | lr                   | weight_decay         |
| norm, bias, embedding | lr       | 0                    |
| table     | lr * table_lr_factor | table_weight_decay   |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer, check_range

ROLES = ("matrix", "norm", "bias", "embedding", "table")
_NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Name, parameter and role of every trainable parameter, each parameter once.

    A module may declare `parameter_roles = {"weight": "table"}`; else norms and embeddings are known by their class,
    biases by their name, and what has fewer than two dimensions counts as a norm's gain.

    Raises:
        ConfigError: a module declares a role that does not exist.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        declared: Mapping[str, str] = getattr(module, "parameter_roles", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            role = declared.get(name) or _usual_role(module, name, parameter)
            check_choice(f"{type(module).__name__}.parameter_roles['{name}']", role, ROLES)
            yield f"{module_name}.{name}" if module_name else name, parameter, role


def _usual_role(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _NORMS):
        return "norm"
    if name.endswith("bias"):
        return "bias"
    return "matrix" if parameter.ndim >= 2 else "norm"


def parameter_groups(model: nn.Module, optim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AdamW groups with `lr`, `weight_decay`, and `name` for loggers; empty groups are left out."""
    decayed = {"matrix": optim["weight_decay"], "table": optim["table_weight_decay"]}
    rates = {"table": optim["lr"] * optim["table_lr_factor"]}
    grouped: dict[str, list[nn.Parameter]] = {"matrix": [], "gain": [], "table": []}
    for _, parameter, role in parameter_roles(model):
        grouped[role if role in grouped else "gain"].append(parameter)
    return [
        {"name": name, "params": params, "lr": rates.get(name, optim["lr"]), "weight_decay": decayed.get(name, 0.0)}
        for name, params in grouped.items()
        if params
    ]


def configured_schedule(optim: Mapping[str, Any], max_steps: int) -> Callable[[int], float]:
    """`schedule_factor` with the arguments of the `optim` group; the shares are of `max_steps`.

    Raises:
        ConfigError: as `schedule_factor`, or a share outside 0 to 1.
    """
    check_integer("trainer.max_steps", max_steps)
    check_range("optim.warmup_share", optim["warmup_share"], 0, 1)
    for name in ("lr", "weight_decay", "table_lr_factor", "table_weight_decay"):
        check_range(f"optim.{name}", optim[name], 0)
    for name in ("clip_norm", "table_clip_norm"):
        if optim[name] is not None:
            check_range(f"optim.{name}", optim[name], 0)
    return schedule_factor(
        optim["schedule"],
        max_steps=max_steps,
        warmup_steps=int(max_steps * optim["warmup_share"]),
        final_factor=optim["final_factor"],
        decay_share=optim["decay_share"],
    )


def schedule_factor(
    schedule: str, *, max_steps: int, warmup_steps: int, final_factor: float, decay_share: float
) -> Callable[[int], float]:
    """The factor on every group's learning rate at a step: linear warm-up, then the named shape, down to
    `final_factor` at `max_steps`.

    Args:
        schedule: `cosine`, `linear`, or `wsd` (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; linear decay
            over the last `decay_share` of the steps).
        max_steps: optimizer steps of the run.
        warmup_steps: steps until the full rate.
        final_factor: factor at the end, 0 to 1.
        decay_share: for `wsd`, 0 to 1.

    Raises:
        ConfigError: an unknown schedule, a number out of range, or no positive `max_steps`.
    """
    check_integer("trainer.max_steps", max_steps)
    check_choice("optim.schedule", schedule, ("cosine", "linear", "wsd"))
    check_range("optim.final_factor", final_factor, 0, 1)
    check_range("optim.decay_share", decay_share, 0, 1)
    if max_steps < 1:
        raise ConfigError(f"trainer.max_steps={max_steps} gives the schedule no length; set a number of steps.")
    check_range("optim.warmup_steps", warmup_steps, 0, max_steps)
    start = max(warmup_steps, int(max_steps * (1 - decay_share))) if schedule == "wsd" else warmup_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - start) / max(1, max_steps - start)) if step > start else 0.0
        shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
        return final_factor + (1 - final_factor) * shape

    return factor
