"""Gradient clipping by norm for sharded parameters: one norm per device mesh, combined into one factor for all.

`torch.nn.utils.clip_grad_norm_` raises for gradients of different meshes (torch 2.13); here the norm of each mesh is
reduced separately. Value tables are clipped by `clip_tables` in `memory/table_clipping.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pkm_lightning.ops.ranks import full_tensor


def norm_limit(configured: float | None) -> float | None:
    """Returns the norm to clip to; 0 means no clipping, like None, as it does in Lightning and DeepSpeed."""
    return configured or None


def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales the gradients of `parameters` so that their common L2 norm is at most `max_norm`; None only measures.

    Returns:
        The norm before clipping, a scalar tensor, the same on every rank.
    """
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if not by_mesh:
        return torch.zeros(())
    # A gradient on the host (a table beside a model on a GPU) has its norm there: one device for the sum.
    norms = [_total_norm(group) for group in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if max_norm is not None:
        for group in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _total_norm(group: list[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
    return full_tensor(norm)
