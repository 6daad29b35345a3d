"""Counts what a rank receives in a run at torch's collectives: those of this package, of DDP, FSDP2 and DeepSpeed.

An all-reduce counts as a ring, as in NCCL, not as gloo's algorithm.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pkm_lightning import ops
from pkm_lightning.memory import TableOptimizer, mesh, replicas, sharded_reads
from pkm_lightning.training import clipping

#: Files of the package that call collectives, and the kind of their traffic.
_FILES = {
    sharded_reads.__file__: "table_forward",
    replicas.__file__: "replicas",
    mesh.__file__: "small",
    clipping.__file__: "small",
    ops.ranks.__file__: "statistics",
}
# Functions are compared by their code, not by name, so that a renamed one is an error and not another kind.
_MEAN_SQUARES = TableOptimizer._mean_squares.__code__
_OF_EVERY_KIND = {ops.ranks.gather_into.__code__, ops.ranks.reduce_scatter_into.__code__}
#: Losses, norms, numbers of tokens: a few values each.
_SMALL = 64


class Received(TorchDispatchMode):
    """Counts bytes by (kind, operation) while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            received = _received(name, args)
            self.bytes[_kind(received), name] += received
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _received(name: str, args: Any) -> int:
    group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
    ranks = group.size()
    first = sum(t.nbytes for t in _tensors(args[0]))
    if name in ("allreduce_", "allreduce_coalesced_"):
        return 2 * (ranks - 1) * first // ranks
    if name in ("_allgather_base_", "allgather_", "alltoall_base_", "allgather_into_tensor_coalesced_"):
        return (ranks - 1) * first // ranks
    if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
        return (ranks - 1) * first
    if name == "reduce_":
        return (ranks - 1) * first // ranks  # the root, which each rank is for its share
    if name == "broadcast_":
        return (ranks - 1) * first // ranks
    return 0


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _kind(received: int) -> str:
    frame = sys._getframe(2)
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        if code in _OF_EVERY_KIND:
            continue
        if code.co_filename == ops.collectives.__file__ and code.co_name == "backward":
            return "table_backward"
        if code is _MEAN_SQUARES:
            return "row_statistics"
        if code.co_filename in _FILES:
            return _FILES[code.co_filename]
    return "small" if received < _SMALL else "dense"
