"""weighted_gather by ATen's embedding bag, which never writes the T * K gathered rows.

Letters: G groups per token, X = T * G rows, L = T * K reads, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.row_gradients.eager import table_gradient
from pkm_lightning.ops.segments import read_sources

__all__ = ["dot_in_chunks", "gather_dot", "gather_sum", "table_gradient"]

_SUM = 0  # number of the mode "sum" in ATen's embedding bag
#: Gathered values held at a time where ATen has no kernel: 32 MiB in half precision.
_CHUNK_VALUES = 2**24


def gather_sum(table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `y[t * G + g] = sum of weights[t, k] * table[ids[t, k]]` over the k in group g, as (X, V)."""
    if groups_TK is None:
        return torch.nn.functional.embedding_bag(ids_TK, table_NV, per_sample_weights=weights_TK, mode="sum")
    tokens, per_token = ids_TK.shape
    # Sorted by group, the reads of each (token, group) are one bag of consecutive rows: each row is read once.
    sorted_TK, order_TK = torch.sort(groups_TK, dim=1, stable=True)
    group_TG = torch.arange(n_groups, device=ids_TK.device, dtype=groups_TK.dtype).repeat(tokens, 1)
    start_TG = torch.searchsorted(sorted_TK, group_TG)
    start_T1 = torch.arange(tokens, device=ids_TK.device).unsqueeze(-1) * per_token
    return torch.nn.functional.embedding_bag(
        ids_TK.gather(1, order_TK).flatten(),
        table_NV,
        (start_T1 + start_TG).flatten().to(ids_TK.dtype),  # ATen requires ids and offsets of one dtype
        per_sample_weights=weights_TK.gather(1, order_TK).flatten(),
        mode="sum",
    )


def gather_dot(table_NV: Tensor, rows_XV: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `a[t, k] = <table[ids[t, k]], rows[t * G + groups[t, k]]>`, to ATen the gradient of a bag's weights."""
    # Older torch versions that the package allows have no half-precision kernel for this on CUDA.
    if table_NV.is_cuda and table_NV.dtype in (torch.bfloat16, torch.float16):
        return dot_in_chunks(table_NV, rows_XV, ids_TK, groups_TK, n_groups)
    sources_L = read_sources(ids_TK, groups_TK, n_groups).flatten().to(ids_TK.dtype)
    # ATen derives the bag of each read from the offsets only if it gets no sources; zeros of the right length suffice.
    dots_L: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_XV, table_NV, ids_TK.flatten(), sources_L.new_zeros(len(rows_XV)), sources_L, _SUM
    )
    return dots_L.view(ids_TK.shape)


def dot_in_chunks(table_NV: Tensor, rows_XV: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `gather_dot` by batched matrix products, with at most 2**24 gathered values in memory at a time."""
    rows_TVG = rows_XV.view(len(ids_TK), n_groups, -1).mT
    step = max(1, _CHUNK_VALUES // (ids_TK.shape[1] * table_NV.shape[1]))
    parts = []
    for start in range(0, len(ids_TK), step):
        chunk = slice(start, start + step)
        # All groups are multiplied and one is taken: that costs G times the arithmetic, but is one matrix product.
        dots_CKG = torch.bmm(table_NV[ids_TK[chunk].long()], rows_TVG[chunk])
        group_CK1 = torch.zeros_like(ids_TK[chunk]) if groups_TK is None else groups_TK[chunk]
        parts.append(dots_CKG.gather(-1, group_CK1.long().unsqueeze(-1)).squeeze(-1))
    return torch.cat(parts)
