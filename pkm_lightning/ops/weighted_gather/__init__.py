"""Weighted sums of table rows: the read of a sparse memory.

Letters: N rows of the table, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.weighted_gather.operator import gather
from pkm_lightning.ops.weighted_gather.reference import weighted_gather_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(gather, backend="cpu"),
    "triton": functools.partial(gather, backend="triton"),
    "eager": functools.partial(gather, backend="eager"),
    "reference": weighted_gather_reference,
}
_INTEGERS = (torch.int32, torch.int64)

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
    there is none. Each row is read once all the same. Only the gradients that are asked for are computed.

    Args:
        table_ND: the rows.
        ids_TK: int32 or int64 row numbers, 0 to N - 1; a row may occur several times in one read.
        weights_TK: any floating dtype; cast to the table's.
        groups_TK: int32 or int64, 0 to n_groups - 1; together with `n_groups`.
        n_groups: groups G a read, 1 or more.
        backend: `auto`, `cpu` (ATen and numba), `triton`, `eager` (ATen's embedding bag) or `reference` (gather,
            multiply, add).

    Returns:
        y_TD, or y_TGD with groups, in the table's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, one of `groups_TK` and `n_groups` without the other, an unknown
            backend; on the CPU ids or groups out of range, which no other device checks.
    """
    if table_ND.ndim != 2 or ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(
            "weighted_gather: needs table (N, D) and ids, weights of one shape (T, K), got "
            f"{tuple(table_ND.shape)}, {tuple(ids_TK.shape)}, {tuple(weights_TK.shape)}."
        )
    if not table_ND.device == ids_TK.device == weights_TK.device:
        raise ValueError(
            f"weighted_gather: the table is on {table_ND.device}, ids on {ids_TK.device}, weights on "
            f"{weights_TK.device}; all need one device."
        )
    if ids_TK.dtype not in _INTEGERS or not weights_TK.is_floating_point() or not table_ND.is_floating_point():
        raise ValueError(
            "weighted_gather: needs ids of torch.int32 or torch.int64 and a floating table and weights, got "
            f"{ids_TK.dtype}, {table_ND.dtype}, {weights_TK.dtype}."
        )
    if (groups_TK is None) != (n_groups is None) or (
        groups_TK is not None
        and n_groups is not None
        and (n_groups < 1 or groups_TK.shape != ids_TK.shape or groups_TK.dtype not in _INTEGERS)
    ):
        raise ValueError(
            f"weighted_gather: needs integer groups of the shape {tuple(ids_TK.shape)} of ids together with n_groups "
            f"of 1 or more, got {None if groups_TK is None else (tuple(groups_TK.shape), groups_TK.dtype)} and "
            f"n_groups={n_groups}."
        )
    implementation = choose_backend("weighted_gather", backend, best_backend(table_ND), _BACKENDS, table_ND)
    y_TGD = implementation(table_ND, ids_TK, weights_TK.to(table_ND.dtype), groups_TK, n_groups or 1)
    return y_TGD.squeeze(1) if groups_TK is None else y_TGD
