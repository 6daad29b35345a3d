"""The weighted gather through ATen's embedding bag, which never writes the T * K gathered rows.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.weighted_gather.reference import grouped_gather_reference, weighted_gather_reference


def weighted_gather_eager(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`."""
    # ATen has no gradient of bf16 weights on CUDA in the older torch versions that the package allows.
    if table_ND.is_cuda and table_ND.dtype is torch.bfloat16:
        return weighted_gather_reference(table_ND, ids_TK, weights_TK)
    weights_TK = weights_TK.to(table_ND.dtype)
    return torch.nn.functional.embedding_bag(ids_TK, table_ND, per_sample_weights=weights_TK, mode="sum")


def grouped_gather_eager(
    table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor, n_groups: int
) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`: sorted by group, each (read, group) is one bag of consecutive rows."""
    if table_ND.is_cuda and table_ND.dtype is torch.bfloat16:
        return grouped_gather_reference(table_ND, ids_TK, weights_TK, groups_TK, n_groups)
    reads, per_read = ids_TK.shape
    sorted_TK, order_TK = torch.sort(groups_TK, dim=1, stable=True)
    group_TG = torch.arange(n_groups, device=ids_TK.device, dtype=groups_TK.dtype).repeat(reads, 1)
    start_TG = torch.searchsorted(sorted_TK, group_TG)
    start_T1 = torch.arange(reads, device=ids_TK.device).unsqueeze(-1) * per_read
    # ATen wants ids and offsets of one dtype.
    y_XD = torch.nn.functional.embedding_bag(
        ids_TK.gather(1, order_TK).flatten().long(),
        table_ND,
        (start_T1 + start_TG).flatten(),
        per_sample_weights=weights_TK.to(table_ND.dtype).gather(1, order_TK).flatten(),
        mode="sum",
    )
    return y_XD.view(reads, n_groups, table_ND.shape[1])
