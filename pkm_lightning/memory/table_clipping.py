"""The gradient norm over value tables and dense parameters, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pkm_lightning.memory.replicas import norm_over_members
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.ops.ranks import full_tensor, local_shard


def clip_tables(tables: Sequence[ValueTable], others: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients of `tables` and `others` to a common L2 norm of at most `max_norm`.

    Collective: call on all ranks.

    Args:
        tables: at least one, the same on all ranks; their gradients are staged, or autograd's.
        others: dense gradients that belong to the same norm, equal on all ranks or DTensors.
        max_norm: the limit; None only measures.

    Returns:
        The norm before clipping, a scalar tensor, the same on every rank.
    """
    dense = list(others)
    norms = [_table_norm(table) for table in tables] + [full_tensor(grad.norm()) for grad in dense]
    # Tables in host memory have their norm on the host.
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    if max_norm is not None:
        # As torch.nn.utils.clip_grads_with_norm_ does. The norm stays on the device: no host synchronisation.
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for table in tables:
            if table.stage is not None:
                table.stage.scale = table.stage.scale * factor
        for grad in (*dense, *(table.weight.grad for table in tables if table.weight.grad is not None)):
            part = local_shard(grad)
            part.mul_(factor.to(part))
    return total


def _table_norm(table: ValueTable) -> Tensor:
    if table.stage is not None:
        return table.stage.norm(table.weight)
    grad = table.weight.grad
    return norm_over_members(torch.zeros(()) if grad is None else full_tensor(grad.norm()), table.mesh)
