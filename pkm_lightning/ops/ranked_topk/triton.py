"""ranked_topk on a GPU: score and index are packed into one integer, so that a sort by value also breaks ties.

A program keeps the best of its rows in registers and merges one block of scores after the other into them.

Letters: R rows, L scores per row; K indices kept, P = K padded to a power of two; M rows of a program, Q scores of a
block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ids

_ROWS = 4  # per program: with the smallest block, 512 scores for its 128 threads
_SMALLEST_BLOCK = 128  # scores


@triton.jit
def pack(scores, places):  # type: ignore[no-untyped-def]
    """Packs each score and its place into an int64, larger for larger scores and, among equal scores, for lower places.

    NaN ranks above infinity, -0.0 equals 0.0.
    """
    bits = scores.to(tl.int32, bitcast=True)
    # The bits of a float without its sign grow with its magnitude; both zeros have the magnitude 0.
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, magnitude)
    # All NaNs become the one number above infinity, 0x7F800000.
    keys = tl.where(magnitude > 0x7F800000, 0x7F800001, keys)
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def packed_scores(packed):  # type: ignore[no-untyped-def]
    """Unpacks the scores; NaN comes back with one bit pattern, and -0.0 as 0.0."""
    keys = (packed >> 32).to(tl.int32)
    return tl.where(keys < 0, (-keys) | -0x80000000, keys).to(tl.float32, bitcast=True)


@triton.jit
def packed_places(packed):  # type: ignore[no-untyped-def]
    """Unpacks the places."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def below_all(shape: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a block of the shape whose numbers are lower than every packed score."""
    return tl.full(shape, -0x7FFFFFFFFFFFFFFF, tl.int64)


@triton.jit
def merge_best(best_MP, block_MQ):  # type: ignore[no-untyped-def]
    """Returns the P best of both, best first; `best_MP` must be sorted so."""
    block_MP = tl.topk(block_MQ, best_MP.shape[1])
    # The larger of a descending and an ascending list, place by place, are the P best of both (a bitonic merge).
    return tl.sort(tl.maximum(best_MP, tl.flip(block_MP, 1)), 1, descending=True)


@triton.jit
def _rank_rows(  # type: ignore[no-untyped-def]
    scores_RL, values_RK, indices_RK, rows, n_scores,
    K: tl.constexpr, P: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # int64: the offsets of large inputs pass 2**31.
    row_M1 = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    best_MP = below_all((M, P))
    for block in range(BLOCKS):
        place_1Q = (block * Q + tl.arange(0, Q))[None, :]
        inside_MQ = (row_M1 < rows) & (place_1Q < n_scores)
        scores_MQ = tl.load(scores_RL + row_M1 * n_scores + place_1Q, mask=inside_MQ, other=0.0)
        best_MP = merge_best(best_MP, tl.where(inside_MQ, pack(scores_MQ, place_1Q), below_all((M, Q))))
    rank_1P = tl.arange(0, P)[None, :]
    is_kept_MP = (row_M1 < rows) & (rank_1P < K)
    tl.store(values_RK + row_M1 * K + rank_1P, packed_scores(best_MP), mask=is_kept_MP)
    tl.store(indices_RK + row_M1 * K + rank_1P, packed_places(best_MP), mask=is_kept_MP)


def rank_rows(scores_RL: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
    """Writes the K best of each row of float32 scores and their int32 indices; all contiguous, 1 <= K <= L."""
    rows, n_scores = scores_RL.shape
    if rows:
        sizes = _sizes(n_scores, values_RK.shape[1])
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(scores_RL):
            _rank_rows[(triton.cdiv(rows, _ROWS),)](scores_RL, values_RK, indices_RK, rows, n_scores, **sizes)


def _sizes(n_scores: int, k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(k)
    # The best of a block are merged with the best so far, so a block has at least P scores.
    block = max(_SMALLEST_BLOCK, padded)
    # A power of two, so that rows of many lengths share one compiled kernel.
    blocks = triton.next_power_of_2(triton.cdiv(n_scores, block))
    return {"K": k, "P": padded, "M": _ROWS, "Q": block, "BLOCKS": blocks}


def launch_examples() -> None:
    """Launches the kernel: see `pkm_lightning.ops.example_tables`."""
    for rows, n_scores, k in ((16384, 1024, 32), (16384, 1024, 128), (9, 1000, 7)):
        rank_rows(torch.empty(rows, n_scores), torch.empty(rows, k), ids(rows, k))
