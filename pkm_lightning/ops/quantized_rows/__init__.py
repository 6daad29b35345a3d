"""Reads of table rows of 8, 4 or 2 bits per value, straight from their codes and scales.

Letters: C bytes of codes per row, Q scales per row, G groups per token.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.quantized_rows.format import (
    VALUES_PER_SCALE,
    WIDTHS,
    QuantizedRows,
    dequantize_rows,
    quantize_rows,
    stored_shapes,
)
from pkm_lightning.ops.quantized_rows.operator import dot, gather
from pkm_lightning.ops.quantized_rows.reference import quantized_dot_reference, quantized_gather_reference
from pkm_lightning.ops.segments import INDEX_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_KERNELS = ("cpu", "triton", "eager")
_GATHERS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(gather, backend=name) for name in _KERNELS},
    "reference": quantized_gather_reference,
}
_DOTS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(dot, backend=name) for name in _KERNELS},
    "reference": quantized_dot_reference,
}

__all__ = [
    "VALUES_PER_SCALE",
    "WIDTHS",
    "QuantizedRows",
    "dequantize_rows",
    "quantize_rows",
    "quantized_dot",
    "quantized_gather",
    "stored_shapes",
]


def quantized_gather(
    rows: QuantizedRows,
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
    *,
    groups_TK: Int[Tensor, "T K"] | None = None,
    n_groups: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "T V"] | Float[Tensor, "T G V"]:
    """Computes `y[t] = sum_k weights[t, k] * rows[ids[t, k]]` in float32; nothing of it has a gradient.

    With groups, `y[t, g]` sums only those k with `groups[t, k] == g`, and is zero if there is none.

    Args:
        rows: the table, as `quantize_rows` returns it.
        ids_TK: int32 or int64 row ids, 0 to N - 1; a token may read a row several times.
        weights_TK: weights of any floating dtype.
        groups_TK: int32 or int64, 0 to n_groups - 1; requires `n_groups`.
        n_groups: number G of groups per token, 1 or more; requires `groups_TK`.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (torch operations) or `reference`, which expands the table.

    Returns:
        y_TV, or y_TGV with groups, in the dtype of the weights.

    Raises:
        ValueError: shapes or dtypes do not fit, the backend is unknown, or an id or group is out of range (checked on
            the CPU only).
    """
    _check("quantized_gather", rows, ids_TK, "weights", weights_TK, tuple(ids_TK.shape))
    if (groups_TK is None) != (n_groups is None) or (
        groups_TK is not None
        and n_groups is not None
        and (n_groups < 1 or groups_TK.shape != ids_TK.shape or groups_TK.dtype not in INDEX_DTYPES)
    ):
        raise ValueError(
            f"quantized_gather: needs integer groups of the shape {tuple(ids_TK.shape)} of ids together with n_groups "
            f"of 1 or more, got {None if groups_TK is None else (tuple(groups_TK.shape), groups_TK.dtype)} and "
            f"n_groups={n_groups}."
        )
    codes_NC = rows.codes_NC
    implementation = choose_backend("quantized_gather", backend, best_backend(codes_NC), _GATHERS, codes_NC)
    y_TGV = implementation(rows, ids_TK, weights_TK.float(), groups_TK, n_groups or 1).to(weights_TK.dtype)
    return y_TGV.squeeze(1) if groups_TK is None else y_TGV


def quantized_dot(
    rows: QuantizedRows,
    x_TV: Float[Tensor, "T V"],
    ids_TK: Int[Tensor, "T K"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "T K"]:
    """Computes `a[t, k] = <rows[ids[t, k]], x[t]>` in float32; nothing of it has a gradient.

    Args:
        rows: the table, as `quantize_rows` returns it.
        x_TV: inputs of any floating dtype.
        ids_TK: int32 or int64 row ids, 0 to N - 1; a row may occur several times.
        backend: as for `quantized_gather`.

    Returns:
        a_TK in the dtype of x.

    Raises:
        ValueError: as for `quantized_gather`.
    """
    _check("quantized_dot", rows, ids_TK, "x", x_TV, (*ids_TK.shape[:1], rows.dim))
    codes_NC = rows.codes_NC
    implementation = choose_backend("quantized_dot", backend, best_backend(codes_NC), _DOTS, codes_NC)
    return implementation(rows, x_TV.float(), ids_TK).to(x_TV.dtype)


def _check(op: str, rows: QuantizedRows, ids_TK: Tensor, name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    codes, scales = rows.codes_NC, rows.scales_NQ
    if rows.bits not in WIDTHS.values():
        raise ValueError(f"{op}: bits={rows.bits}; allowed: 8, 4, 2.")
    expected = stored_shapes(len(codes), rows.dim, rows.bits)
    if (tuple(codes.shape), tuple(scales.shape)) != expected:
        raise ValueError(
            f"{op}: rows of {rows.dim} values of {rows.bits} bits have codes and scales of {expected[0]} and "
            f"{expected[1]}, got {tuple(codes.shape)} and {tuple(scales.shape)}."
        )
    if ids_TK.ndim != 2 or other.shape != shape:
        raise ValueError(
            f"{op}: needs ids (T, K) and {name} of {shape}, got {tuple(ids_TK.shape)} and {tuple(other.shape)}."
        )
    if not codes.device == scales.device == ids_TK.device == other.device:
        raise ValueError(
            f"{op}: codes are on {codes.device}, scales on {scales.device}, ids on {ids_TK.device}, {name} on "
            f"{other.device}; all need one device."
        )
    is_stored = (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
    if not is_stored or ids_TK.dtype not in INDEX_DTYPES or not other.is_floating_point():
        raise ValueError(
            f"{op}: needs codes of torch.uint8, scales of torch.bfloat16, ids of torch.int32 or torch.int64 and {name} "
            f"of a floating dtype, got {codes.dtype}, {scales.dtype}, {ids_TK.dtype}, {other.dtype}."
        )
