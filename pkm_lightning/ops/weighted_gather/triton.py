"""weighted_gather on a GPU: each program has the loads of several rows under way and adds them up in float32.

Letters: G groups per token, X = T * G rows; suffixes in kernels: R reads and C columns of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.row_gradients.triton import table_gradient
from pkm_lightning.ops.weighted_gather import eager

__all__ = ["aot_signatures", "gather_dot", "gather_sum", "table_gradient"]

#: Most columns of a block. Blocks of columns are the slow axis of the grid: all tokens pass over one slice of the table
#: before the next, and the slice of a small table stays in the L2 cache.
_COLUMNS = 256
#: Rows per block. The loop over blocks hides the latency of random rows by loading this many at once.
_IN_FLIGHT = 8
#: Columns up to which a block has more rows, and a program fewer warps: 8 narrow rows would leave most threads idle.
_NARROW = 32
#: Most values of a block of narrow rows.
_NARROW_TILE = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_sum(table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `eager.gather_sum`; float64 goes to `eager`."""
    if table_NV.dtype not in _DTYPES:
        return eager.gather_sum(table_NV, ids_TK, weights_TK, groups_TK, n_groups)
    tokens, dim = len(ids_TK), table_NV.shape[1]
    y_XV = table_NV.new_empty(tokens * n_groups, dim)
    sizes = _sizes(ids_TK, dim, grouped=groups_TK is not None)
    grid = tokens, n_groups, triton.cdiv(dim, sizes["BLOCK_V"])
    # Without groups the kernel does not read the pointer, but Triton needs some tensor there.
    groups = ids_TK if groups_TK is None else groups_TK
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(table_NV):
        _gather_sum[grid](table_NV, ids_TK, weights_TK, groups, y_XV, **sizes)
    return y_XV


def gather_dot(table_NV: Tensor, rows_XV: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `eager.gather_dot`; float64 goes to `eager`."""
    if table_NV.dtype not in _DTYPES:
        return eager.gather_dot(table_NV, rows_XV, ids_TK, groups_TK, n_groups)
    dots_TK = table_NV.new_empty(ids_TK.shape)
    sizes = _sizes(ids_TK, table_NV.shape[1], grouped=groups_TK is not None)
    grid = len(ids_TK), triton.cdiv(ids_TK.shape[1], sizes["BLOCK_K"])
    groups = ids_TK if groups_TK is None else groups_TK
    with torch.cuda.device_of(table_NV):
        _gather_dot[grid](table_NV, rows_XV, ids_TK, groups, dots_TK, n_groups, **sizes)
    return dots_TK


def _sizes(ids_TK: Tensor, dim: int, grouped: bool) -> dict[str, Any]:
    """Returns constants and number of warps of both kernels; blocks are powers of two, as Triton requires."""
    columns, reads = max(16, min(triton.next_power_of_2(dim), _COLUMNS)), _IN_FLIGHT
    warps = {}
    if columns <= _NARROW:
        reads = max(reads, min(triton.next_power_of_2(ids_TK.shape[1]), _NARROW_TILE // columns))
        # 256 values per warp: two loads of 128 bits per thread in fp32, one in half precision.
        warps = {"num_warps": max(1, reads * columns // 256)}
    return {"GROUPED": grouped, "K": ids_TK.shape[1], "V": dim, "BLOCK_K": reads, "BLOCK_V": columns, **warps}


@triton.jit
def _gather_sum(  # type: ignore[no-untyped-def]
    table, ids, weights, groups, y,
    GROUPED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes one block of columns of y[t, g]; rows of other groups are masked, which costs no load."""
    # int64: the offsets of large outputs pass 2**31.
    t = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    v_C = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row_C = v_C < V
    # Reads are added up separately and reduced at the end: one reduction per program instead of one per block.
    total_RC = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k_R = first + tl.arange(0, BLOCK_K)
        is_read_R = k_R < K
        if GROUPED:
            is_read_R = is_read_R & (tl.load(groups + t * K + k_R, mask=is_read_R, other=-1) == g)
        # int32 row ids times V pass 2**31 in large tables.
        row_R = tl.load(ids + t * K + k_R, mask=is_read_R, other=0).to(tl.int64)
        weight_R = tl.load(weights + t * K + k_R, mask=is_read_R, other=0.0).to(tl.float32)
        mask_RC = is_read_R[:, None] & in_row_C[None, :]
        values_RC = tl.load(table + row_R[:, None] * V + v_C[None, :], mask=mask_RC, other=0.0)
        total_RC += weight_R[:, None] * values_RC.to(tl.float32)
    out_C = y + (t * tl.num_programs(1) + g) * V + v_C
    tl.store(out_C, tl.sum(total_RC, axis=0).to(y.dtype.element_ty), mask=in_row_C)


@triton.jit
def _gather_dot(  # type: ignore[no-untyped-def]
    table, rows, ids, groups, dots, n_groups,
    GROUPED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_K inner products of one token, whose upstream row stays in the L1 cache."""
    t = tl.program_id(0).to(tl.int64)
    k_R = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_read_R = k_R < K
    row_R = tl.load(ids + t * K + k_R, mask=is_read_R, other=0).to(tl.int64)
    source_R = tl.zeros((BLOCK_K,), dtype=tl.int64) + t * n_groups
    if GROUPED:
        source_R += tl.load(groups + t * K + k_R, mask=is_read_R, other=0).to(tl.int64)
    # Columns are added up separately and reduced at the end: one reduction per program instead of one per block.
    total_RC = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        v_C = first + tl.arange(0, BLOCK_V)
        mask_RC = is_read_R[:, None] & (v_C < V)[None, :]
        values_RC = tl.load(table + row_R[:, None] * V + v_C[None, :], mask=mask_RC, other=0.0)
        upstream_RC = tl.load(rows + source_R[:, None] * V + v_C[None, :], mask=mask_RC, other=0.0)
        total_RC += values_RC.to(tl.float32) * upstream_RC.to(tl.float32)
    tl.store(dots + t * K + k_R, tl.sum(total_RC, axis=1).to(dots.dtype.element_ty), mask=is_read_R)


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Lists kernels with types of arguments and constants, to compile them ahead of time without a GPU."""
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    # Both dtypes in which tables are trained, and a width that is no power of two; each kernel with and without groups.
    for element, dim, grouped in (
        ("fp32", 1024, False),
        ("bf16", 1024, False),
        ("fp32", 16, False),
        ("bf16", 100, True),
    ):
        names = ("table", "weights", "y", "rows", "dots")
        types = dict.fromkeys(names, f"*{element}") | {"ids": "*i32", "groups": "*i64", "n_groups": "i32"}
        sizes = _sizes(torch.empty(1, 128, dtype=torch.float32), dim, grouped)
        cases += [(kernel, types, sizes) for kernel in (_gather_sum, _gather_dot)]
    return cases
