"""Ranked top-k on a GPU: score and place packed into one integer, so that a sort by value alone settles ties.

A program keeps the best of its rows in registers and merges one block of scores after the other into them.

Letters: R rows, S scores a row, K kept, M rows of a program, N scores of a block, P = K padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _SMALLEST_BLOCK = 4, 128


@triton.jit
def pack(scores, places):  # type: ignore[no-untyped-def]
    """One integer a score: larger for larger scores, NaN above infinity, -0.0 as 0.0; then for lower places."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, magnitude)
    keys = tl.where(magnitude > 0x7F800000, 0x7F800001, keys)
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def packed_scores(packed):  # type: ignore[no-untyped-def]
    """The scores: NaN of one kind, and 0.0 for -0.0."""
    keys = (packed >> 32).to(tl.int32)
    return tl.where(keys < 0, (-keys) | -0x80000000, keys).to(tl.float32, bitcast=True)


@triton.jit
def packed_places(packed):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def below_all(shape: tl.constexpr):  # type: ignore[no-untyped-def]
    """What packs to less than every score."""
    return tl.full(shape, -0x7FFFFFFFFFFFFFFF, tl.int64)


@triton.jit
def merge_best(best_MP, block_MN):  # type: ignore[no-untyped-def]
    """The P best of both, best first, as `best_MP` comes in: a list and another one backwards make a bitonic one."""
    block_MP = tl.topk(block_MN, best_MP.shape[1])
    return tl.sort(tl.maximum(best_MP, tl.flip(block_MP, 1)), 1, descending=True)


@triton.jit
def _rank_rows(  # type: ignore[no-untyped-def]
    scores_RS, values_RK, indices_RK, rows, n_scores,
    K: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row_M1 = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    best_MP = below_all((M, P))
    for block in range(BLOCKS):
        place_1N = (block * N + tl.arange(0, N))[None, :]
        inside_MN = (row_M1 < rows) & (place_1N < n_scores)
        scores_MN = tl.load(scores_RS + row_M1 * n_scores + place_1N, mask=inside_MN, other=0.0)
        best_MP = merge_best(best_MP, tl.where(inside_MN, pack(scores_MN, place_1N), below_all((M, N))))
    rank_1P = tl.arange(0, P)[None, :]
    kept_MP = (row_M1 < rows) & (rank_1P < K)
    tl.store(values_RK + row_M1 * K + rank_1P, packed_scores(best_MP), mask=kept_MP)
    tl.store(indices_RK + row_M1 * K + rank_1P, packed_places(best_MP), mask=kept_MP)


def rank_rows(scores_RS: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
    """Writes the K best of each row of fp32 scores and their int32 indices; all contiguous, 1 <= K <= S."""
    rows, n_scores = scores_RS.shape
    if rows:
        sizes = _sizes(n_scores, values_RK.shape[1])
        with torch.cuda.device_of(scores_RS):
            _rank_rows[(triton.cdiv(rows, _ROWS),)](scores_RS, values_RK, indices_RK, rows, n_scores, **sizes)


def _sizes(n_scores: int, k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(k)
    block = max(_SMALLEST_BLOCK, padded)
    # A power of two, so that rows of many lengths share one compiled kernel.
    blocks = triton.next_power_of_2(triton.cdiv(n_scores, block))
    return {"K": k, "P": padded, "M": _ROWS, "N": block, "BLOCKS": blocks}


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, int]]]:
    """Kernels with argument types and constants, for compilation ahead of time without a GPU."""
    types = {"scores_RS": "*fp32", "values_RK": "*fp32", "indices_RK": "*i32", "rows": "i32", "n_scores": "i32"}
    return [(_rank_rows, types, _sizes(n_scores, k)) for n_scores, k in ((1024, 32), (1000, 7))]
