"""The weighted gather on a GPU: each program keeps several rows in flight and adds them up in float32.

Columns are cut into blocks and the blocks are the slow axis of the grid: all reads pass over one slice of the table
before the next, and for a small table that slice stays in the L2 cache.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read, X = T * G.
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

_COLUMNS = 256  # at most, in one block
_IN_FLIGHT = 8  # rows whose loads one program has under way
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_sum(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """See `eager.gather_sum`; float64 goes there."""
    if table_ND.dtype not in _DTYPES:
        return eager.gather_sum(table_ND, ids_TK, weights_TK, groups_TK, n_groups)
    reads, dim = len(ids_TK), table_ND.shape[1]
    y_XD = table_ND.new_empty(reads * n_groups, dim)
    sizes = _sizes(ids_TK, dim, grouped=groups_TK is not None)
    grid = reads, n_groups, triton.cdiv(dim, sizes["BLOCK_D"])
    with torch.cuda.device_of(table_ND):
        _gather_sum[grid](table_ND, ids_TK, weights_TK, ids_TK if groups_TK is None else groups_TK, y_XD, **sizes)
    return y_XD


def gather_dot(table_ND: Tensor, rows_XD: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """See `eager.gather_dot`; float64 goes there."""
    if table_ND.dtype not in _DTYPES:
        return eager.gather_dot(table_ND, rows_XD, ids_TK, groups_TK, n_groups)
    dots_TK = table_ND.new_empty(ids_TK.shape)
    sizes = _sizes(ids_TK, table_ND.shape[1], grouped=groups_TK is not None)
    grid = len(ids_TK), triton.cdiv(ids_TK.shape[1], _IN_FLIGHT)
    groups = ids_TK if groups_TK is None else groups_TK
    with torch.cuda.device_of(table_ND):
        _gather_dot[grid](table_ND, rows_XD, ids_TK, groups, dots_TK, n_groups, **sizes)
    return dots_TK


def _sizes(ids_TK: Tensor, dim: int, grouped: bool) -> dict[str, Any]:
    columns = max(16, min(triton.next_power_of_2(dim), _COLUMNS))
    return {"GROUPED": grouped, "K": ids_TK.shape[1], "D": dim, "BLOCK_K": _IN_FLIGHT, "BLOCK_D": columns}


@triton.jit
def _gather_sum(  # type: ignore[no-untyped-def]
    table, ids, weights, groups, y,
    GROUPED: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns of y[t, g]; rows of other groups are not loaded."""
    t = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        live = k < K
        if GROUPED:
            live = live & (tl.load(groups + t * K + k, mask=live, other=-1) == g)
        # int32 row numbers times D pass 2**31 in large tables.
        row = tl.load(ids + t * K + k, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32)
        mask = live[:, None] & in_row[None, :]
        values = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * values.to(tl.float32)
    out = y + (t * tl.num_programs(1) + g) * D + d
    tl.store(out, tl.sum(total, axis=0).to(y.dtype.element_ty), mask=in_row)


@triton.jit
def _gather_dot(  # type: ignore[no-untyped-def]
    table, rows, ids, groups, dots, n_groups,
    GROUPED: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_K inner products of one read; its upstream row stays in the first-level cache."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = k < K
    row = tl.load(ids + t * K + k, mask=live, other=0).to(tl.int64)
    source = tl.zeros((BLOCK_K,), dtype=tl.int64) + t * n_groups
    if GROUPED:
        source += tl.load(groups + t * K + k, mask=live, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)[None, :]
        values = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        upstream = tl.load(rows + source[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += values.to(tl.float32) * upstream.to(tl.float32)
    tl.store(dots + t * K + k, tl.sum(total, axis=1).to(dots.dtype.element_ty), mask=live)


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernels with argument types and constants, for compilation ahead of time without a GPU."""
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for element, dim, grouped in (("fp32", 1024, False), ("bf16", 1024, False), ("bf16", 100, True)):
        sizes = _sizes(torch.empty(1, 128), dim, grouped)
        names = ("table", "weights", "y", "rows", "dots")
        pointers = dict.fromkeys(names, f"*{element}") | {"ids": "*i32", "groups": "*i64", "n_groups": "i32"}
        for kernel in (_gather_sum, _gather_dot):
            runtime = [name for name in kernel.arg_names if name not in sizes]
            cases.append((kernel, {name: pointers[name] for name in runtime}, sizes))
    return cases
