"""Weighted sums of table rows: the read of a sparse memory.

Letters: N rows of the table, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.weighted_gather.eager import grouped_gather_eager, weighted_gather_eager
from pkm_lightning.ops.weighted_gather.reference import grouped_gather_reference, weighted_gather_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS = {"eager": weighted_gather_eager, "reference": weighted_gather_reference}
_GROUPED_BACKENDS = {"eager": grouped_gather_eager, "reference": grouped_gather_reference}

__all__ = ["weighted_gather"]


def weighted_gather(
    table_ND: Float[Tensor, "N D"],
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
    *,
    groups_TK: Int[Tensor, "T K"] | None = None,
    n_groups: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "T D"] | Float[Tensor, "T G D"]:
    """`y[t] = sum_k weights[t, k] * table[ids[t, k]]`, differentiable in the table and in the weights.

    With groups, a read is added up by group: `y[t, g]` is the sum over those k with `groups[t, k] == g`, zero where
    there is none. Each row is read once all the same.

    Args:
        table_ND: the rows.
        ids_TK: int32 or int64 row numbers, 0 to N - 1; a row may occur several times in one read.
        weights_TK: any floating dtype; cast to the table's.
        groups_TK: int32 or int64, 0 to n_groups - 1 (not checked); together with `n_groups`.
        n_groups: groups G a read, 1 or more.
        backend: `auto`, `eager` (ATen's embedding bag where it can) or `reference` (gather, multiply, add).

    Returns:
        y_TD, or y_TGD with groups, in the table's dtype.

    Raises:
        ValueError: shapes that do not fit, one of `groups_TK` and `n_groups` without the other, or an unknown backend.
    """
    if table_ND.ndim != 2 or ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(
            "weighted_gather: needs table (N, D) and ids, weights of one shape (T, K), got "
            f"{tuple(table_ND.shape)}, {tuple(ids_TK.shape)}, {tuple(weights_TK.shape)}."
        )
    if groups_TK is None and n_groups is None:
        return choose_backend("weighted_gather", backend, "eager", _BACKENDS, table_ND)(table_ND, ids_TK, weights_TK)
    if groups_TK is None or n_groups is None or n_groups < 1 or groups_TK.shape != ids_TK.shape:
        raise ValueError(
            f"weighted_gather: needs groups of the shape {tuple(ids_TK.shape)} of ids together with n_groups of 1 or "
            f"more, got {None if groups_TK is None else tuple(groups_TK.shape)} and n_groups={n_groups}."
        )
    grouped = choose_backend("weighted_gather", backend, "eager", _GROUPED_BACKENDS, table_ND)
    return grouped(table_ND, ids_TK, weights_TK, groups_TK, n_groups)
