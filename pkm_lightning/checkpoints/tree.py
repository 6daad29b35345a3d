"""Splits a checkpoint into its tensors by name and a skeleton: the rest, small enough for every rank to read.

A name is the path to the tensor: `state_dict.model.norm.weight`, `optimizer_states.0.state.3.exp_avg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAME = "__tensor__"
#: More entries than any checkpoint has beside its tensors; to walk through them takes seconds.
_MOST_ENTRIES = 2_000_000


def flatten(checkpoint: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Returns the skeleton, in which `{"__tensor__": name}` stands for each tensor, and the tensors by name."""
    if isinstance(checkpoint, Tensor):
        return {_NAME: path}, {path: checkpoint}
    # Keys keep their types in the skeleton: optimizer states are numbered by integers.
    if isinstance(checkpoint, Mapping):
        items = [(key, flatten(value, f"{path}.{key}" if path else str(key))) for key, value in checkpoint.items()]
        skeleton: Any = {key: part for key, (part, _) in items}
    elif isinstance(checkpoint, list | tuple):
        items = [(i, flatten(value, f"{path}.{i}")) for i, value in enumerate(checkpoint)]
        skeleton = type(checkpoint)([part for _, (part, _) in items])
    else:
        return checkpoint, {}
    return skeleton, {name: tensor for _, (_, tensors) in items for name, tensor in tensors.items()}


def check_extent(node: Any) -> None:
    """Refuses nested containers in which few entries are reached in very many ways: ten lists of ten lists and so on.

    A pickle of some hundred bytes can describe them, and to walk through them would never end.

    Raises:
        ValueError: there are more than two million entries, counted as often as they are reached, or a cycle.
    """
    if _extent(node, {}) > _MOST_ENTRIES:
        raise ValueError("it refers to its own parts again and again.")


def _extent(node: Any, known: dict[int, int]) -> int:
    # Of the records of an inert pickle (pkm_lightning.checkpoints.inert), what they are made from.
    node = getattr(node, "parts", node)
    if not isinstance(node, Mapping | list | tuple):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_ENTRIES + 1  # holds within a cycle
        children = node.values() if isinstance(node, Mapping) else node
        known[id(node)] = 1 + sum(_extent(child, known) for child in children)
    return known[id(node)]


def restore(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the checkpoint that `flatten` split into `skeleton` and `tensors`."""
    if isinstance(skeleton, Mapping):
        if skeleton.keys() == {_NAME}:
            return tensors[skeleton[_NAME]]
        return {key: restore(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        return type(skeleton)([restore(value, tensors) for value in skeleton])
    return skeleton
