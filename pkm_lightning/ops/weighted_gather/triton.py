"""weighted_gather on a GPU: each program has the loads of several rows under way and adds them up in float32.

Where the reads of a token are too few and too narrow for the threads of a program, a program takes several tokens.

Letters: G groups per token, X = T * G rows, L = T * K reads; suffixes in kernels: R reads, M tokens and C columns of a
block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import NARROW, ODD, ROWS, TABLES, TOKENS, ids
from pkm_lightning.ops.row_gradients.triton import table_gradient
from pkm_lightning.ops.weighted_gather import eager

__all__ = ["gather_dot", "gather_sum", "launch_examples", "table_gradient"]

#: Most columns of a block. Blocks of columns are the slow axis of the grid: all tokens pass over one slice of the table
#: before the next, and the slice of a small table stays in the L2 cache.
_COLUMNS = 256
#: Rows per block. The loop over blocks hides the latency of random rows by loading this many at once.
_IN_FLIGHT = 8
#: Bytes up to which the columns of a block are narrow: 8 rows of them are fewer than a load of 128 bits per thread.
_NARROW_BYTES = 128
#: Most values of a block of narrow rows of one token.
_NARROW_TILE = 1024
#: Values per warp of such a block: two loads of 128 bits per thread in fp32, one in half precision.
_PER_WARP = 256
#: Most values that a token reads from narrow rows if it shares its program with others: those of one warp.
_SHARED_VALUES = 256
#: Bytes of one read of each token of a shared program: one load of 128 bits for each of its 128 threads.
_READ_BYTES = 2048
#: Values of a block of inner products with narrow rows, 16 per thread.
_DOT_TILE = 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_sum(table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `eager.gather_sum`; float64 goes to `eager`."""
    if table_NV.dtype not in _DTYPES:
        return eager.gather_sum(table_NV, ids_TK, weights_TK, groups_TK, n_groups)
    (tokens, reads), dim = ids_TK.shape, table_NV.shape[1]
    y_XV = table_NV.new_empty(tokens * n_groups, dim)
    # Without groups the kernels do not read the pointer, but Triton needs some tensor there.
    groups, grouped = (ids_TK, False) if groups_TK is None else (groups_TK, True)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(table_NV):
        if _is_narrow(dim, table_NV.itemsize) and triton.next_power_of_2(reads) * _columns(dim) <= _SHARED_VALUES:
            sizes = _packed_sizes(reads, dim, table_NV.itemsize)
            _gather_sum_packed[triton.cdiv(tokens, sizes["BLOCK_T"]), n_groups](
                table_NV, ids_TK, weights_TK, groups, y_XV, tokens, GROUPED=grouped, **sizes
            )
        else:
            sizes = _sizes(reads, dim, table_NV.itemsize)
            _gather_sum[tokens, n_groups, triton.cdiv(dim, sizes["BLOCK_V"])](
                table_NV, ids_TK, weights_TK, groups, y_XV, GROUPED=grouped, **sizes
            )
    return y_XV


def gather_dot(table_NV: Tensor, rows_XV: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `eager.gather_dot`; float64 goes to `eager`."""
    if table_NV.dtype not in _DTYPES:
        return eager.gather_dot(table_NV, rows_XV, ids_TK, groups_TK, n_groups)
    dots_TK = table_NV.new_empty(ids_TK.shape)
    sizes = _dot_sizes(ids_TK.shape[1], table_NV.shape[1], table_NV.itemsize)
    grid = (triton.cdiv(ids_TK.numel(), sizes["BLOCK_L"]),)
    groups, grouped = (ids_TK, False) if groups_TK is None else (groups_TK, True)
    with torch.cuda.device_of(table_NV):
        _gather_dot[grid](
            table_NV, rows_XV, ids_TK, groups, dots_TK, n_groups, ids_TK.numel(), GROUPED=grouped, **sizes
        )
    return dots_TK


def _columns(dim: int) -> int:
    """Returns the columns of a block; blocks are powers of two, as Triton requires."""
    return int(max(16, min(triton.next_power_of_2(dim), _COLUMNS)))


def _is_narrow(dim: int, itemsize: int) -> bool:
    return _columns(dim) * itemsize <= _NARROW_BYTES


def _sizes(reads: int, dim: int, itemsize: int) -> dict[str, Any]:
    """Returns constants and number of warps of the sum of one token."""
    columns, rows = _columns(dim), _IN_FLIGHT
    warps = {}
    if _is_narrow(dim, itemsize):
        rows = max(rows, min(triton.next_power_of_2(reads), _NARROW_TILE // columns))
        warps = {"num_warps": rows * columns // _PER_WARP}
    return {"K": reads, "V": dim, "BLOCK_K": rows, "BLOCK_V": columns, **warps}


def _packed_sizes(reads: int, dim: int, itemsize: int) -> dict[str, Any]:
    """Returns constants of the sums of several tokens."""
    columns, rows = _columns(dim), min(triton.next_power_of_2(reads), _IN_FLIGHT)
    tokens = _READ_BYTES // (columns * itemsize)
    return {"K": reads, "V": dim, "BLOCK_K": rows, "BLOCK_T": tokens, "BLOCK_V": columns}


def _dot_sizes(reads: int, dim: int, itemsize: int) -> dict[str, Any]:
    """Returns constants of the inner products."""
    columns = _columns(dim)
    rows = _DOT_TILE // columns if _is_narrow(dim, itemsize) else _IN_FLIGHT
    return {"K": reads, "V": dim, "BLOCK_L": rows, "BLOCK_V": columns}


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


# Triton specialises integers of 1 and multiples of 16: a number that changes every step would compile more kernels.
@triton.jit(do_not_specialize=["tokens"])
def _gather_sum_packed(  # type: ignore[no-untyped-def]
    table, ids, weights, groups, y, tokens,
    GROUPED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes y[t, g] of BLOCK_T tokens.

    Reads are the slowest axis of a block: a thread holds the same columns of all reads of its token, so that it adds
    them up alone.
    """
    t_M = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.program_id(1)
    v_C = tl.arange(0, BLOCK_V)
    total_MC = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k_R = first + tl.arange(0, BLOCK_K)
        place_RM = t_M[None, :] * K + k_R[:, None]
        is_read_RM = (k_R < K)[:, None] & (t_M < tokens)[None, :]
        if GROUPED:
            is_read_RM = is_read_RM & (tl.load(groups + place_RM, mask=is_read_RM, other=-1) == g)
        row_RM = tl.load(ids + place_RM, mask=is_read_RM, other=0).to(tl.int64)
        weight_RM = tl.load(weights + place_RM, mask=is_read_RM, other=0.0).to(tl.float32)
        mask_RMC = is_read_RM[:, :, None] & (v_C < V)[None, None, :]
        values_RMC = tl.load(table + row_RM[:, :, None] * V + v_C[None, None, :], mask=mask_RMC, other=0.0)
        total_MC += tl.sum(weight_RM[:, :, None] * values_RMC.to(tl.float32), axis=0)
    out_MC = y + ((t_M * tl.num_programs(1) + g) * V)[:, None] + v_C[None, :]
    tl.store(out_MC, total_MC.to(y.dtype.element_ty), mask=(t_M < tokens)[:, None] & (v_C < V)[None, :])


@triton.jit(do_not_specialize=["reads"])
def _gather_dot(  # type: ignore[no-untyped-def]
    table, rows, ids, groups, dots, n_groups, reads,
    GROUPED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L inner products; the upstream rows of their few tokens stay in the L1 cache."""
    l_R = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    is_read_R = l_R < reads
    row_R = tl.load(ids + l_R, mask=is_read_R, other=0).to(tl.int64)
    # Reads are numbered through, token after token.
    source_R = l_R // K * n_groups
    if GROUPED:
        source_R += tl.load(groups + l_R, mask=is_read_R, other=0).to(tl.int64)
    # Columns are added up separately and reduced at the end: one reduction per program instead of one per block.
    total_RC = tl.zeros((BLOCK_L, BLOCK_V), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        v_C = first + tl.arange(0, BLOCK_V)
        mask_RC = is_read_R[:, None] & (v_C < V)[None, :]
        values_RC = tl.load(table + row_R[:, None] * V + v_C[None, :], mask=mask_RC, other=0.0)
        upstream_RC = tl.load(rows + source_R[:, None] * V + v_C[None, :], mask=mask_RC, other=0.0)
        total_RC += values_RC.to(tl.float32) * upstream_RC.to(tl.float32)
    tl.store(dots + l_R, tl.sum(total_RC, axis=1).to(dots.dtype.element_ty), mask=is_read_R)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    for dim, dtype in TABLES:
        _launch(dim, dtype, reads=128, n_groups=1)
        # Few reads of narrow rows, of which a program takes several tokens.
        if dim in NARROW:
            _launch(dim, dtype, reads=6, n_groups=1)
    _launch(64, torch.bfloat16, reads=3, n_groups=1)
    for dim, reads in ((20, 7), (ODD, 127)):
        _launch(dim, torch.bfloat16, reads=reads, n_groups=2)


def _launch(dim: int, dtype: torch.dtype, reads: int, n_groups: int) -> None:
    table_NV, rows_XV = (torch.empty(rows, dim, dtype=dtype) for rows in (ROWS, TOKENS * n_groups))
    weights_TK = torch.empty(TOKENS, reads, dtype=dtype)
    groups_TK = None if n_groups == 1 else ids(TOKENS, reads)
    gather_sum(table_NV, ids(TOKENS, reads), weights_TK, groups_TK, n_groups)
    gather_dot(table_NV, rows_XV, ids(TOKENS, reads), groups_TK, n_groups)
