"""Reads of quantised rows on a GPU: each byte of codes is loaded once and gives the values of all its planes.

Letters: C bytes of codes per row, Q scales per row, G groups per token, X = T * G sums; suffixes in kernels: R reads
and Y bytes of a block, L planes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ROWS, TOKENS, ids
from pkm_lightning.ops.quantized_rows.format import VALUES_PER_SCALE, QuantizedRows, stored_shapes

__all__ = ["gather_dot", "gather_sum", "launch_examples"]

#: Most columns of a block, over all planes; see `pkm_lightning.ops.weighted_gather.triton`.
_COLUMNS = 256
#: Rows per block, whose loads are under way at once.
_IN_FLIGHT = 8


def gather_sum(
    rows: QuantizedRows, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """Computes `eager.gather_sum`."""
    y_XV = weights_TK.new_empty(len(ids_TK) * n_groups, rows.dim)
    sizes = _sizes(ids_TK.shape[1], rows.dim, rows.bits)
    grid = len(ids_TK), n_groups, triton.cdiv(sizes["C"], sizes["BLOCK_C"])
    # Without groups the kernel does not read the pointer, but Triton needs some tensor there.
    groups, grouped = (ids_TK, False) if groups_TK is None else (groups_TK, True)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(y_XV):
        _gather_sum[grid](rows.codes_NC, rows.scales_NQ, ids_TK, weights_TK, groups, y_XV, GROUPED=grouped, **sizes)
    return y_XV


def gather_dot(rows: QuantizedRows, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `eager.gather_dot`."""
    dots_TK = x_TV.new_empty(ids_TK.shape)
    sizes = _sizes(ids_TK.shape[1], rows.dim, rows.bits)
    grid = len(ids_TK), triton.cdiv(ids_TK.shape[1], _IN_FLIGHT)
    with torch.cuda.device_of(x_TV):
        _gather_dot[grid](rows.codes_NC, rows.scales_NQ, x_TV, ids_TK, dots_TK, **sizes)
    return dots_TK


def _sizes(reads: int, dim: int, bits: int) -> dict[str, Any]:
    """Returns the compile-time constants of both kernels; blocks are powers of two, as Triton requires."""
    planes, width = 8 // bits, triton.cdiv(dim * bits, 8)
    return {
        "K": reads, "V": dim, "C": width, "Q": triton.cdiv(dim, VALUES_PER_SCALE), "BITS": bits, "PLANES": planes,
        "PER_SCALE": VALUES_PER_SCALE, "BLOCK_K": _IN_FLIGHT,
        "BLOCK_C": max(16, min(triton.next_power_of_2(width), _COLUMNS // planes)),
    }  # fmt: skip


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    codes, scales, row_R, is_read_R, byte_Y, plane_L, value_LY,
    V: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, PER_SCALE: tl.constexpr,
):  # fmt: skip
    """Returns the values of a block of bytes of some rows, (R, L, Y); zero where there is no value."""
    in_row_RY = is_read_R[:, None] & (byte_Y < C)[None, :]
    byte_RY = tl.load(codes + row_R[:, None] * C + byte_Y[None, :], mask=in_row_RY, other=0).to(tl.int32)
    code_RLY = (byte_RY[:, None, :] >> (plane_L * BITS)[None, :, None]) & ((1 << BITS) - 1)
    is_value_RLY = in_row_RY[:, None, :] & (value_LY < V)[None, :, :]
    place_RLY = row_R[:, None, None] * Q + (value_LY // PER_SCALE)[None, :, :]
    scale_RLY = tl.load(scales + place_RLY, mask=is_value_RLY, other=0.0).to(tl.float32)
    return scale_RLY * (code_RLY.to(tl.float32) - ((1 << BITS) - 1) / 2)


@triton.jit
def _gather_sum(  # type: ignore[no-untyped-def]
    codes, scales, ids, weights, groups, y,
    GROUPED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes one block of bytes of y[t, g], in all planes; rows of other groups are masked, which costs no load."""
    # int64: the offsets of large outputs pass 2**31.
    t = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    byte_Y = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    plane_L = tl.arange(0, PLANES)
    value_LY = plane_L[:, None] * C + byte_Y[None, :]
    # Reads are added up separately and reduced at the end: one reduction per program instead of one per block.
    total_RLY = tl.zeros((BLOCK_K, PLANES, BLOCK_C), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k_R = first + tl.arange(0, BLOCK_K)
        is_read_R = k_R < K
        if GROUPED:
            is_read_R = is_read_R & (tl.load(groups + t * K + k_R, mask=is_read_R, other=-1) == g)
        # int32 row ids times C pass 2**31 in large tables.
        row_R = tl.load(ids + t * K + k_R, mask=is_read_R, other=0).to(tl.int64)
        weight_R = tl.load(weights + t * K + k_R, mask=is_read_R, other=0.0)
        values_RLY = _values(codes, scales, row_R, is_read_R, byte_Y, plane_L, value_LY, V, C, Q, BITS, PER_SCALE)
        total_RLY += weight_R[:, None, None] * values_RLY
    out_LY = y + (t * tl.num_programs(1) + g) * V + value_LY
    tl.store(out_LY, tl.sum(total_RLY, axis=0), mask=(byte_Y < C)[None, :] & (value_LY < V))


@triton.jit
def _gather_dot(  # type: ignore[no-untyped-def]
    codes, scales, x, ids, dots,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    PER_SCALE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_K inner products of one token, whose input stays in the L1 cache."""
    t = tl.program_id(0).to(tl.int64)
    k_R = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_read_R = k_R < K
    row_R = tl.load(ids + t * K + k_R, mask=is_read_R, other=0).to(tl.int64)
    plane_L = tl.arange(0, PLANES)
    total_RLY = tl.zeros((BLOCK_K, PLANES, BLOCK_C), dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        byte_Y = first + tl.arange(0, BLOCK_C)
        value_LY = plane_L[:, None] * C + byte_Y[None, :]
        is_value_LY = (byte_Y < C)[None, :] & (value_LY < V)
        x_LY = tl.load(x + t * V + value_LY, mask=is_value_LY, other=0.0)
        values_RLY = _values(codes, scales, row_R, is_read_R, byte_Y, plane_L, value_LY, V, C, Q, BITS, PER_SCALE)
        total_RLY += values_RLY * x_LY[None, :, :]
    tl.store(dots + t * K + k_R, tl.sum(tl.sum(total_RLY, axis=2), axis=1), mask=is_read_R)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    # Every width; then one that is no power of two, with groups.
    for bits, dim, n_groups in ((8, 32, 1), (8, 1024, 1), (4, 1024, 1), (2, 1024, 1), (2, 100, 2)):
        code_shape, scale_shape = stored_shapes(ROWS, dim, bits)
        codes_NC, scales_NQ = torch.empty(code_shape, dtype=torch.uint8), torch.empty(scale_shape, dtype=torch.bfloat16)
        rows, weights_TK = QuantizedRows(codes_NC, scales_NQ, bits, dim), torch.empty(TOKENS, 128)
        groups_TK = None if n_groups == 1 else ids(TOKENS, 128)
        gather_sum(rows, ids(TOKENS, 128), weights_TK, groups_TK, n_groups)
        gather_dot(rows, torch.empty(TOKENS, dim), ids(TOKENS, 128))
