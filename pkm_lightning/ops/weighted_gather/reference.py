"""Naive weighted_gather: gather T * K rows, multiply by the weights, add up.

Letters: G groups per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_gather_reference(
    table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """Computes `pkm_lightning.ops.weighted_gather` as (T, G, V); holds T * K * V values in memory, for each group anew.

    Groups multiply the weights as one-hot vectors.
    """
    rows_TKV = table_NV[ids_TK.long()]
    if groups_TK is None:
        return (weights_TK.unsqueeze(-1) * rows_TKV).sum(dim=1, keepdim=True)
    one_hot_TKG = groups_TK.unsqueeze(-1) == torch.arange(n_groups, device=groups_TK.device)
    weights_TKG = weights_TK.unsqueeze(-1) * one_hot_TKG
    return torch.stack([(weights_TKG[..., g, None] * rows_TKV).sum(dim=1) for g in range(n_groups)], dim=1)
