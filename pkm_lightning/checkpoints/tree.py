"""Splits a checkpoint into its tensors by name and a skeleton: the rest, small enough for every rank to read.

A name is the path to the tensor: `state_dict.model.norm.weight`, `optimizer_states.0.state.3.exp_avg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAME = "__tensor__"


def flatten(checkpoint: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Returns the skeleton, in which `{"__tensor__": name}` stands for each tensor, and the tensors by name."""
    if isinstance(checkpoint, Tensor):
        return {_NAME: path}, {path: checkpoint}
    if isinstance(checkpoint, Mapping):
        items = [(key, flatten(value, f"{path}.{key}" if path else str(key))) for key, value in checkpoint.items()]
        skeleton: Any = {key: part for key, (part, _) in items}
    elif isinstance(checkpoint, list | tuple):
        items = [(i, flatten(value, f"{path}.{i}")) for i, value in enumerate(checkpoint)]
        skeleton = type(checkpoint)([part for _, (part, _) in items])
    else:
        return checkpoint, {}
    return skeleton, {name: tensor for _, (_, tensors) in items for name, tensor in tensors.items()}


def restore(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the checkpoint that `flatten` split into `skeleton` and `tensors`."""
    if isinstance(skeleton, Mapping):
        if skeleton.keys() == {_NAME}:
            return tensors[skeleton[_NAME]]
        return {key: restore(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        return type(skeleton)([restore(value, tensors) for value in skeleton])
    return skeleton
