"""Weighted sums of table rows: how each token reads from a value table.

Letters: G groups per token.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.segments import INDEX_DTYPES
from pkm_lightning.ops.weighted_gather.operator import gather
from pkm_lightning.ops.weighted_gather.reference import weighted_gather_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(gather, backend=name) for name in ("cpu", "triton", "eager")},
    "reference": weighted_gather_reference,
}

__all__ = ["check_read", "weighted_gather"]


def weighted_gather(
    table_NV: Float[Tensor, "N V"],
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
    *,
    groups_TK: Int[Tensor, "T K"] | None = None,
    n_groups: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "T V"] | Float[Tensor, "T G V"]:
    """Computes `y[t] = sum_k weights[t, k] * table[ids[t, k]]`, differentiable in the table and in the weights.

    With groups, `y[t, g]` sums only those k with `groups[t, k] == g`, and is zero if there is none; each row is still
    read once. The backward computes only those gradients that autograd asks for.

    Args:
        table_NV: the table.
        ids_TK: int32 or int64 row ids, 0 to N - 1; a token may read a row several times.
        weights_TK: weights of any floating dtype; cast to the table's.
        groups_TK: int32 or int64, 0 to n_groups - 1; requires `n_groups`.
        n_groups: number G of groups per token, 1 or more; requires `groups_TK`.
        backend: `auto`, `cpu` (ATen and numba), `triton`, `eager` (ATen's embedding bag) or `reference` (gather,
            multiply, add).

    Returns:
        y_TV, or y_TGV with groups, in the table's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, only one of `groups_TK` and `n_groups` is given, the backend is
            unknown, or an id or group is out of range (checked on the CPU only).
    """
    check_read(table_NV, ids_TK, weights_TK, groups_TK, n_groups)
    implementation = choose_backend("weighted_gather", backend, best_backend(table_NV), _BACKENDS, table_NV)
    y_TGV = implementation(table_NV, ids_TK, weights_TK.to(table_NV.dtype), groups_TK, n_groups or 1)
    return y_TGV.squeeze(1) if groups_TK is None else y_TGV


def check_read(
    table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int | None
) -> None:
    """Checks the arguments of `weighted_gather`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or only one of `groups_TK` and `n_groups` is given.
    """
    if table_NV.ndim != 2 or ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(
            "weighted_gather: needs table (N, V) and ids, weights of one shape (T, K), got "
            f"{tuple(table_NV.shape)}, {tuple(ids_TK.shape)}, {tuple(weights_TK.shape)}."
        )
    if not table_NV.device == ids_TK.device == weights_TK.device:
        raise ValueError(
            f"weighted_gather: the table is on {table_NV.device}, ids on {ids_TK.device}, weights on "
            f"{weights_TK.device}; all need one device."
        )
    if ids_TK.dtype not in INDEX_DTYPES or not weights_TK.is_floating_point() or not table_NV.is_floating_point():
        raise ValueError(
            "weighted_gather: needs ids of torch.int32 or torch.int64 and table and weights of floating dtypes, got "
            f"{ids_TK.dtype}, {table_NV.dtype}, {weights_TK.dtype}."
        )
    if (groups_TK is None) != (n_groups is None) or (
        groups_TK is not None
        and n_groups is not None
        and (n_groups < 1 or groups_TK.shape != ids_TK.shape or groups_TK.dtype not in INDEX_DTYPES)
    ):
        raise ValueError(
            f"weighted_gather: needs integer groups of the shape {tuple(ids_TK.shape)} of ids together with n_groups "
            f"of 1 or more, got {None if groups_TK is None else (tuple(groups_TK.shape), groups_TK.dtype)} and "
            f"n_groups={n_groups}."
        )
