"""Inner products of each token with the table rows that it reads: the input side of a single-neuron expert."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.gathered_dot.operator import dot
from pkm_lightning.ops.gathered_dot.reference import gathered_dot_reference
from pkm_lightning.ops.segments import INDEX_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(dot, backend=name) for name in ("cpu", "triton", "eager")},
    "reference": gathered_dot_reference,
}

__all__ = ["gathered_dot"]


def gathered_dot(
    table_NV: Float[Tensor, "N V"],
    x_TV: Float[Tensor, "T V"],
    ids_TK: Int[Tensor, "T K"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "T K"]:
    """Computes `a[t, k] = <table[ids[t, k]], x[t]>` (He 2024, arXiv 2407.04153); differentiable in the table and in x.

    The backward computes only those gradients that autograd asks for.

    Args:
        table_NV: the table.
        x_TV: inputs of any floating dtype; cast to the table's.
        ids_TK: int32 or int64 row ids, 0 to N - 1; a row may occur several times.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (ATen) or `reference` (gather, multiply, add), which alone
            holds the T * K gathered rows in memory.

    Returns:
        a_TK in the table's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, the backend is unknown, or an id is out of range (checked on the CPU
            only).
    """
    if table_NV.ndim != 2 or ids_TK.ndim != 2 or x_TV.shape != (ids_TK.shape[0], table_NV.shape[1]):
        raise ValueError(
            "gathered_dot: needs table (N, V), x (T, V) and ids (T, K), got "
            f"{tuple(table_NV.shape)}, {tuple(x_TV.shape)}, {tuple(ids_TK.shape)}."
        )
    if ids_TK.dtype not in INDEX_DTYPES:
        raise ValueError(f"gathered_dot: ids are {ids_TK.dtype}; allowed: torch.int32, torch.int64.")
    if not table_NV.is_floating_point() or not x_TV.is_floating_point():
        raise ValueError(f"gathered_dot: needs table and x of floating dtypes, got {table_NV.dtype} and {x_TV.dtype}.")
    implementation = choose_backend("gathered_dot", backend, best_backend(table_NV), _BACKENDS, table_NV)
    return implementation(table_NV, x_TV.to(table_NV.dtype), ids_TK)
