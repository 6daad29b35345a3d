"""The weighted gather as it is written on paper: gather T * K rows, weight them, add them up.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_gather_reference(
    table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`, (T, G, D); keeps T * K * D values in memory, with groups once a group.

    One-hot groups multiply the weights.
    """
    rows_TKD = table_ND[ids_TK.long()]
    if groups_TK is None:
        return (weights_TK.unsqueeze(-1) * rows_TKD).sum(dim=1, keepdim=True)
    one_hot_TKG = groups_TK.unsqueeze(-1) == torch.arange(n_groups, device=groups_TK.device)
    weights_TKG = weights_TK.unsqueeze(-1) * one_hot_TKG
    return torch.stack([(weights_TKG[..., g, None] * rows_TKD).sum(dim=1) for g in range(n_groups)], dim=1)
