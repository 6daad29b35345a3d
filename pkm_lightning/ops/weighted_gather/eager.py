"""The weighted gather through ATen's embedding bag, which never writes the T * K gathered rows.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read, X = T * G, L = T * K, C reads a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.row_gradients.eager import table_gradient
from pkm_lightning.ops.segments import read_sources

__all__ = ["dot_in_chunks", "gather_dot", "gather_sum", "table_gradient"]

_SUM = 0  # embedding_bag's mode
_CHUNK_VALUES = 2**24  # gathered values held at a time where ATen has no kernel


def gather_sum(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """`y[t * G + g] = sum of weights[t, k] * table[ids[t, k]]` over the k in group g, (X, D).

    Sorted by group, each (read, group) is one bag of consecutive rows, so that each row is read once.
    """
    if groups_TK is None:
        return torch.nn.functional.embedding_bag(ids_TK, table_ND, per_sample_weights=weights_TK, mode="sum")
    reads, per_read = ids_TK.shape
    sorted_TK, order_TK = torch.sort(groups_TK, dim=1, stable=True)
    group_TG = torch.arange(n_groups, device=ids_TK.device, dtype=groups_TK.dtype).repeat(reads, 1)
    start_TG = torch.searchsorted(sorted_TK, group_TG)
    start_T1 = torch.arange(reads, device=ids_TK.device).unsqueeze(-1) * per_read
    return torch.nn.functional.embedding_bag(
        ids_TK.gather(1, order_TK).flatten(),
        table_ND,
        (start_T1 + start_TG).flatten().to(ids_TK.dtype),  # ATen wants ids and offsets of one dtype
        per_sample_weights=weights_TK.gather(1, order_TK).flatten(),
        mode="sum",
    )


def gather_dot(table_ND: Tensor, rows_XD: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """`a[t, k] = <table[ids[t, k]], rows[t * G + groups[t, k]]>`: to ATen the gradient of a bag's weights."""
    # ATen has no kernel of this for half precision on CUDA in the older torch versions that the package allows.
    if table_ND.is_cuda and table_ND.dtype in (torch.bfloat16, torch.float16):
        return dot_in_chunks(table_ND, rows_XD, ids_TK, groups_TK, n_groups)
    sources_L = read_sources(ids_TK, groups_TK, n_groups).flatten().to(ids_TK.dtype)
    # Offsets count only where sources are missing.
    dots_L: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_XD, table_ND, ids_TK.flatten(), sources_L.new_zeros(len(rows_XD)), sources_L, _SUM
    )
    return dots_L.view(ids_TK.shape)


def dot_in_chunks(table_ND: Tensor, rows_XD: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """`gather_dot` by batched products of at most 2**24 gathered values at a time."""
    rows_TDG = rows_XD.view(len(ids_TK), n_groups, -1).mT
    step = max(1, _CHUNK_VALUES // (ids_TK.shape[1] * table_ND.shape[1]))
    parts = []
    for start in range(0, len(ids_TK), step):
        chunk = slice(start, start + step)
        dots_CKG = torch.bmm(table_ND[ids_TK[chunk].long()], rows_TDG[chunk])
        group_CK1 = torch.zeros_like(ids_TK[chunk]) if groups_TK is None else groups_TK[chunk]
        parts.append(dots_CKG.gather(-1, group_CK1.long().unsqueeze(-1)).squeeze(-1))
    return torch.cat(parts)
