"""Tensors over the ranks of a run: sums for statistics of the whole batch (batch norm, balancing), and DTensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_distributed() -> bool:
    """Returns whether a process group of more than one rank is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns `value` summed over all ranks. Collective: call on all ranks, equally often and in the same order.

    Differentiable: each rank's gradient is the sum of all ranks' gradients. One process gets its `value` back.
    """
    if not is_distributed():
        return value
    result: Tensor = _AllReduce.apply(value)
    return result


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(value: Tensor) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


# Torch 2.13 renamed both and warns under the old names.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def gather_into(gathered: Tensor, local: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fills `gathered` with the `local` tensors of all ranks, of one shape, in the order of ranks."""
    assert _gather is not None
    _gather(gathered, local, group=group)


def reduce_scatter_into(reduced: Tensor, whole: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fills `reduced` with this rank's share of the sum of `whole` over ranks."""
    assert _reduce is not None
    _reduce(reduced, whole, group=group)


def local_shard(value: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor; a plain tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """Returns `value` as a plain tensor, gathered from all ranks where it is a DTensor.

    Collective for a DTensor: call on all ranks.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value
