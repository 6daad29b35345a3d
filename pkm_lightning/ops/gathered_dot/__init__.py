"""Inner products of a token with the table rows that it addresses: the first half of a single-neuron expert.

Letters: N rows of the table, D values a row, T tokens, K rows a token.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.gathered_dot.operator import dot
from pkm_lightning.ops.gathered_dot.reference import gathered_dot_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(dot, backend="cpu"),
    "triton": functools.partial(dot, backend="triton"),
    "eager": functools.partial(dot, backend="eager"),
    "reference": gathered_dot_reference,
}

__all__ = ["gathered_dot"]


def gathered_dot(
    table_ND: Float[Tensor, "N D"],
    x_TD: Float[Tensor, "T D"],
    ids_TK: Int[Tensor, "T K"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "T K"]:
    """`a[t, k] = <table[ids[t, k]], x[t]>`, differentiable in the table and in x (He 2024, arXiv 2407.04153).

    Only the gradients that are asked for are computed.

    Args:
        table_ND: the rows.
        x_TD: any floating dtype; cast to the table's.
        ids_TK: int32 or int64 row numbers, 0 to N - 1; a row may occur several times.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (ATen) or `reference` (gather, multiply, add), which alone
            holds the T * K gathered rows.

    Returns:
        a_TK in the table's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend; on the CPU ids out of range, which no other
            device checks.
    """
    if table_ND.ndim != 2 or ids_TK.ndim != 2 or x_TD.shape != (ids_TK.shape[0], table_ND.shape[1]):
        raise ValueError(
            "gathered_dot: needs table (N, D), x (T, D) and ids (T, K), got "
            f"{tuple(table_ND.shape)}, {tuple(x_TD.shape)}, {tuple(ids_TK.shape)}."
        )
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gathered_dot: ids are {ids_TK.dtype}; allowed: torch.int32, torch.int64.")
    if not table_ND.is_floating_point() or not x_TD.is_floating_point():
        raise ValueError(f"gathered_dot: needs a floating table and x, got {table_ND.dtype} and {x_TD.dtype}.")
    implementation = choose_backend("gathered_dot", backend, best_backend(table_ND), _BACKENDS, table_ND)
    return implementation(table_ND, x_TD.to(table_ND.dtype), ids_TK)
