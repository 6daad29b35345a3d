"""Table rows one by one: how each token reads from a table that is addressed by token ids."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.gathered_rows.operator import gather
from pkm_lightning.ops.gathered_rows.reference import gathered_rows_reference
from pkm_lightning.ops.segments import INDEX_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(gather, backend=name) for name in ("triton", "eager")},
    "reference": gathered_rows_reference,
}

__all__ = ["default_backend", "gathered_rows"]


def default_backend(table_NV: Tensor) -> str:
    """Returns the backend that `auto` stands for."""
    return "triton" if best_backend(table_NV) == "triton" else "eager"


def gathered_rows(
    table_NV: Float[Tensor, "N V"], ids_TK: Int[Tensor, "T K"], *, backend: str = "auto"
) -> Float[Tensor, "T K V"]:
    """Returns `y[t, k] = table[ids[t, k]]`, differentiable in the table.

    Args:
        table_NV: the table.
        ids_TK: int32 or int64 row ids, 0 to N - 1; a row may occur several times.
        backend: `auto`, `triton`, `eager` (ATen, on the CPU as fast as a loop in numba) or `reference` (a loop).

    Raises:
        ValueError: shapes, devices or dtypes do not fit, the backend is unknown, or an id is out of range (checked on
            the CPU only).
    """
    if table_NV.ndim != 2 or ids_TK.ndim != 2:
        raise ValueError(
            f"gathered_rows: needs table (N, V) and ids (T, K), got {tuple(table_NV.shape)} and {tuple(ids_TK.shape)}."
        )
    if table_NV.device != ids_TK.device:
        raise ValueError(
            f"gathered_rows: the table is on {table_NV.device}, ids on {ids_TK.device}; both need one device."
        )
    if ids_TK.dtype not in INDEX_DTYPES or not table_NV.is_floating_point():
        raise ValueError(
            "gathered_rows: needs a table of a floating dtype and ids of torch.int32 or torch.int64, got "
            f"{table_NV.dtype} and {ids_TK.dtype}."
        )
    implementation = choose_backend("gathered_rows", backend, default_backend(table_NV), _BACKENDS, table_NV)
    return implementation(table_NV, ids_TK)
