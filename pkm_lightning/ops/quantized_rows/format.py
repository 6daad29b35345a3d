"""Rows of 8, 4 or 2 bits per value: packed codes, and one scale per 32 values, chosen for the least squared error.

Scales are bfloat16: they have the range of float32, and codes are chosen for the scale as it is stored, so that its
rounding is no error. A row of fewer bits than 8 per value is packed in planes: byte c holds the values c, c + C, ...,
the first of them in the lowest bits, so that neighbouring values come from neighbouring bytes.

Letters: C bytes of codes per row, Q scales per row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Float32, UInt8
    from torch import Tensor

#: Bits per value by the name of the width.
WIDTHS = {"int8": 8, "int4": 4, "int2": 2}
#: One outlier makes the steps of all values under its scale longer: at 2 bits a whole row is too many.
VALUES_PER_SCALE = 32
#: Scales that are tried, as shares of the one that reaches the largest value. The fewer the levels, the more it pays to
#: clip outliers; with 256 levels it never does.
_SHARES = {8: (1.0,), 4: tuple(n / 20 for n in range(10, 21)), 2: tuple(n / 20 for n in range(8, 21))}
#: Values that are quantised at a time, for which a few copies are held.
_CHUNK_VALUES = 2**20


class QuantizedRows(NamedTuple):
    """Rows as codes and scales. Value v of a row is `scale[v // 32] * (code[v] - (2**bits - 1) / 2)`.

    The levels lie symmetrically around zero, half a step away from it; rows of zeros have scale 0.
    """

    codes_NC: UInt8[Tensor, "N C"]
    scales_NQ: BFloat16[Tensor, "N Q"]
    bits: int
    #: Values per row V.
    dim: int


def stored_shapes(rows: int, dim: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of codes and scales of `rows` rows of `dim` values."""
    return (rows, math.ceil(dim * bits / 8)), (rows, math.ceil(dim / VALUES_PER_SCALE))


def quantize_rows(rows_NV: Float[Tensor, "N V"], bits: int) -> QuantizedRows:
    """Returns rows of any floating dtype in codes, each 32 values with that of the scales tried whose error is least.

    Raises:
        ValueError: `bits` is not 8, 4 or 2, or a value is not finite.
    """
    if bits not in WIDTHS.values():
        raise ValueError(f"quantize_rows: bits={bits}; allowed: 8, 4, 2.")
    n_rows, dim = rows_NV.shape
    code_shape, scale_shape = stored_shapes(n_rows, dim, bits)
    codes_NC = torch.empty(code_shape, dtype=torch.uint8, device=rows_NV.device)
    scales_NQ = torch.empty(scale_shape, dtype=torch.bfloat16, device=rows_NV.device)
    step = max(1, _CHUNK_VALUES // max(1, dim))
    for start in range(0, n_rows, step):
        chunk = slice(start, start + step)
        codes_NC[chunk], scales_NQ[chunk] = _quantized(rows_NV[chunk].float(), bits)
    return QuantizedRows(codes_NC, scales_NQ, bits, dim)


def dequantize_rows(rows: QuantizedRows) -> Float32[Tensor, "N V"]:
    """Returns the rows as values."""
    codes_NV = _unpacked(rows.codes_NC, rows.bits)[:, : rows.dim]
    scales_NV = rows.scales_NQ.float().repeat_interleave(VALUES_PER_SCALE, dim=1)[:, : rows.dim]
    return (codes_NV.float() - middle(rows.bits)) * scales_NV


def middle(bits: int) -> float:
    """Returns the code that zero would have: it lies between the two middle ones."""
    return (2**bits - 1) / 2


def _quantized(rows_NV: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if not rows_NV.isfinite().all():
        raise ValueError("quantize_rows: a value is not finite; rows of finite values can be quantised.")
    dim, zero = rows_NV.shape[1], middle(bits)
    # I are the 32 values of a scale. The last scale may have fewer, and the zeros beside them count for no error.
    padding = -dim % VALUES_PER_SCALE
    values_NQI = torch.nn.functional.pad(rows_NV, (0, padding)).unflatten(1, (-1, VALUES_PER_SCALE))
    is_value_QI = (torch.arange(dim + padding, device=rows_NV.device) < dim).unflatten(0, (-1, VALUES_PER_SCALE))
    largest_NQ = values_NQI.abs().amax(-1)
    best_NQ = torch.full_like(largest_NQ, torch.inf)
    scales_NQ = torch.zeros_like(largest_NQ)
    # Squares of float32 overflow beyond 1e19 and vanish below 1e-23: errors are compared after an exact division.
    unit_NQ1 = torch.exp2(-torch.frexp(largest_NQ).exponent.clamp(-126, 126).float()).unsqueeze(-1)
    # Rounded up to bfloat16, a larger scale would make its last level infinite.
    limit = torch.finfo(torch.float32).max / zero * (1 - 2**-8)
    for share in _SHARES[bits]:
        tried_NQ = (largest_NQ * (share / zero)).clamp_(max=limit).bfloat16().float()
        levels_NQI = _codes(values_NQI, tried_NQ, zero).sub_(zero).mul_(tried_NQ.unsqueeze(-1))
        error_NQ = levels_NQI.sub_(values_NQI).mul_(unit_NQ1).square_().mul_(is_value_QI).sum(-1)
        is_better_NQ = error_NQ < best_NQ
        best_NQ = torch.where(is_better_NQ, error_NQ, best_NQ)
        scales_NQ = torch.where(is_better_NQ, tried_NQ, scales_NQ)
    codes_NV = _codes(values_NQI, scales_NQ, zero).to(torch.uint8).flatten(1)[:, :dim]
    return _packed(codes_NV, bits), scales_NQ.bfloat16()


def _codes(values_NQI: Tensor, scales_NQ: Tensor, zero: float) -> Tensor:
    """Returns the codes of the nearest levels as floats."""
    # Values too small for any scale have scale 0; whatever their code, they are read as 0.
    steps_NQI = values_NQI / scales_NQ.unsqueeze(-1)
    return steps_NQI.add_(zero).round_().nan_to_num_(0.0).clamp_(0, 2 * zero)


def _packed(codes_NV: Tensor, bits: int) -> Tensor:
    planes, width = 8 // bits, math.ceil(codes_NV.shape[1] * bits / 8)
    padded_NV = torch.nn.functional.pad(codes_NV, (0, planes * width - codes_NV.shape[1]))
    packed_NC = torch.zeros_like(padded_NV[:, :width])
    for plane, codes_NC in enumerate(padded_NV.split(max(1, width), dim=1)):
        packed_NC |= codes_NC << (bits * plane)
    return packed_NC


def _unpacked(codes_NC: Tensor, bits: int) -> Tensor:
    return torch.cat([(codes_NC >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=1)
