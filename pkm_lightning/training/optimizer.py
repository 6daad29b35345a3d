"""Optimizer groups by the role of a parameter, as its module declares it.

| role      | learning rate        | weight decay         |
|-----------|----------------------|----------------------|
| matrix    | lr                   | weight_decay         |
| norm, bias, embedding | lr       | 0                    |
| key       | lr * key_lr_factor   | weight_decay         |
| table     | lr * table_lr_factor | table_weight_decay   |

Keys are the sub-keys of product-key and Tucker memories. With a factor of 1 they are in the group of the matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pkm_lightning.errors import ConfigError, check_choice, nearest

ROLES = ("matrix", "norm", "bias", "embedding", "key", "table")
_NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yields name, parameter and role of every trainable parameter, each parameter once.

    A module may declare `parameter_roles = {"weight": "table"}`. Otherwise norms and embeddings are recognised by their
    class, biases by their name, and a parameter of fewer than two dimensions counts as the gain of a norm.

    Raises:
        ConfigError: a module declares a role that does not exist, or the role of a parameter that it does not have.
    """
    visited: set[int] = set()
    for module_name, module in model.named_modules():
        declared: Mapping[str, str] = getattr(module, "parameter_roles", {})
        # Not only registered parameters: an engine's table keeps its weight as an attribute, and a bias may be None.
        for name in declared:
            if not hasattr(module, name):
                known = [own for own, _ in module.named_parameters(recurse=False)]
                raise ConfigError(
                    f"{type(module).__name__}.parameter_roles['{name}'] is not a parameter of the module; allowed: "
                    f"{', '.join(known) or 'none'}.{nearest(name, known)}"
                )
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in visited or not parameter.requires_grad:
                continue
            visited.add(id(parameter))
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
    """Returns AdamW groups with `lr`, `weight_decay`, and `name` for loggers; empty groups are left out."""
    decayed = dict.fromkeys(("matrix", "key"), optim["weight_decay"]) | {"table": optim["table_weight_decay"]}
    key_factor = optim.get("key_lr_factor", 1.0)  # absent in runs of earlier versions
    rates = {"table": optim["lr"] * optim["table_lr_factor"], "key": optim["lr"] * key_factor}
    # `gain` also holds biases and embeddings; logs and saved optimizer states know the group by this name.
    grouped: dict[str, list[nn.Parameter]] = {"matrix": [], "gain": [], "table": [], "key": []}
    for _, parameter, role in parameter_roles(model):
        if role == "key" and key_factor == 1:
            role = "matrix"
        grouped[role if role in grouped else "gain"].append(parameter)
    return [
        {"name": name, "params": params, "lr": rates.get(name, optim["lr"]), "weight_decay": decayed.get(name, 0.0)}
        for name, params in grouped.items()
        if params
    ]
