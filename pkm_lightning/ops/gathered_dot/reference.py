"""Naive gathered_dot: gather T * K rows, multiply, add up."""

from __future__ import annotations

from torch import Tensor


def gathered_dot_reference(table_NV: Tensor, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.gathered_dot`; holds T * K * V values in memory."""
    return (table_NV[ids_TK.long()] * x_TV.unsqueeze(1)).sum(dim=-1)
