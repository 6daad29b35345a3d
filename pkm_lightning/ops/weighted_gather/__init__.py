"""Weighted sums of table rows: the read of a sparse memory.

Letters: N rows of the table, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.weighted_gather.eager import weighted_gather_eager
from pkm_lightning.ops.weighted_gather.reference import weighted_gather_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS = {"eager": weighted_gather_eager, "reference": weighted_gather_reference}

__all__ = ["weighted_gather"]


def weighted_gather(
    table_ND: Float[Tensor, "N D"],
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum_k weights[t, k] * table[ids[t, k]]`, differentiable in the table and in the weights.

    Args:
        table_ND: the rows.
        ids_TK: int32 or int64 row numbers, 0 to N - 1; a row may occur several times in one read.
        weights_TK: any floating dtype; cast to the table's.
        backend: `auto`, `eager` (ATen's embedding bag where it can) or `reference` (gather, multiply, add).

    Returns:
        y_TD in the table's dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    if table_ND.ndim != 2 or ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(
            "weighted_gather: needs table (N, D) and ids, weights of one shape (T, K), got "
            f"{tuple(table_ND.shape)}, {tuple(ids_TK.shape)}, {tuple(weights_TK.shape)}."
        )
    return choose_backend("weighted_gather", backend, "eager", _BACKENDS)(table_ND, ids_TK, weights_TK)
