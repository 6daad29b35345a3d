"""product_combine on a GPU: a program ranks the candidate sums of its rows in registers.

Letters: R rows, J sub-keys kept per half, C candidate pairs; K slots kept; A, Q and P: J, C and K padded to powers of
two; M rows of a program, G pairs of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ids
from pkm_lightning.ops.ranked_topk.triton import below_all, pack, packed_places, packed_scores

#: Sums per program of the forward. With few candidates a program takes several rows, which keeps its threads busy.
_SUMS = 512
_PAIRS = 16  # per block of the gradient


@triton.jit
def _combine_rows(  # type: ignore[no-untyped-def]
    values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C, n_keys, sums_RK, ids_RK, chosen_RK, rows,
    J: tl.constexpr, C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # int64: the offsets of large inputs pass 2**31.
    row_M1 = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    pair_1Q = tl.arange(0, Q)[None, :]
    inside_MQ = (row_M1 < rows) & (pair_1Q < C)
    first_1Q = tl.load(rank1_C + pair_1Q, mask=pair_1Q < C, other=0)
    second_1Q = tl.load(rank2_C + pair_1Q, mask=pair_1Q < C, other=0)
    value1_MQ = tl.load(values1_RJ + row_M1 * J + first_1Q, mask=inside_MQ, other=0.0)
    value2_MQ = tl.load(values2_RJ + row_M1 * J + second_1Q, mask=inside_MQ, other=0.0)
    sums_MQ = value1_MQ + value2_MQ
    # NaN from two numbers: (+inf) + (-inf), which counts as -inf, so that no sum grows with a rank.
    opposite_MQ = (sums_MQ != sums_MQ) & (value1_MQ == value1_MQ) & (value2_MQ == value2_MQ)
    sums_MQ = tl.where(opposite_MQ, float("-inf"), sums_MQ)
    # Candidates are listed in the order that breaks ties, and `pack` prefers the lower place.
    best_MP = tl.topk(tl.where(inside_MQ, pack(sums_MQ, pair_1Q), below_all((M, Q))), P)
    rank_1P = tl.arange(0, P)[None, :]
    is_kept_MP = (row_M1 < rows) & (rank_1P < K)
    pair_MP = packed_places(best_MP)
    first_MP = tl.load(rank1_C + pair_MP, mask=is_kept_MP, other=0)
    second_MP = tl.load(rank2_C + pair_MP, mask=is_kept_MP, other=0)
    key1_MP = tl.load(indices1_RJ + row_M1 * J + first_MP, mask=is_kept_MP, other=0)
    key2_MP = tl.load(indices2_RJ + row_M1 * J + second_MP, mask=is_kept_MP, other=0)
    tl.store(sums_RK + row_M1 * K + rank_1P, packed_scores(best_MP), mask=is_kept_MP)
    tl.store(ids_RK + row_M1 * K + rank_1P, key1_MP * n_keys + key2_MP, mask=is_kept_MP)
    tl.store(chosen_RK + row_M1 * K + rank_1P, pair_MP, mask=is_kept_MP)


@triton.jit
def _add_to_halves(  # type: ignore[no-untyped-def]
    grad_RK, sums_RK, chosen_RK, rank1_C, rank2_C, grad1_RJ, grad2_RJ,
    J: tl.constexpr, K: tl.constexpr, A: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Compares every rank of a half with every chosen pair of a row: more work than atomic additions, but one order."""
    row = tl.program_id(0).to(tl.int64)
    rank_A = tl.arange(0, A)
    sum1_A, sum2_A = tl.zeros((A,), tl.float32), tl.zeros((A,), tl.float32)
    for begin in range(0, K, G):
        slot_G = begin + tl.arange(0, G)
        grad_G = tl.load(grad_RK + row * K + slot_G, mask=slot_G < K, other=0.0)
        # A sum of -inf is a constant: it passes no gradient.
        is_constant_G = tl.load(sums_RK + row * K + slot_G, mask=slot_G < K, other=0.0) == float("-inf")
        grad_G1 = tl.where(is_constant_G, 0.0, grad_G)[:, None]
        pair_G = tl.load(chosen_RK + row * K + slot_G, mask=slot_G < K, other=0)
        first_G1, second_G1 = tl.load(rank1_C + pair_G)[:, None], tl.load(rank2_C + pair_G)[:, None]
        sum1_A += tl.sum(tl.where(first_G1 == rank_A[None, :], grad_G1, 0.0), 0)
        sum2_A += tl.sum(tl.where(second_G1 == rank_A[None, :], grad_G1, 0.0), 0)
    tl.store(grad1_RJ + row * J + rank_A, sum1_A, mask=rank_A < J)
    tl.store(grad2_RJ + row * J + rank_A, sum2_A, mask=rank_A < J)


def combine_rows(
    values1_RJ: Tensor,
    indices1_RJ: Tensor,
    values2_RJ: Tensor,
    indices2_RJ: Tensor,
    rank1_C: Tensor,
    rank2_C: Tensor,
    n_keys: int,
    *results_RK: Tensor,
) -> None:
    """Writes the sums, slot ids and candidates of the K best pairs of every row; all contiguous, float32 and int32."""
    (rows, per_half), candidates = values1_RJ.shape, len(rank1_C)
    sizes = _forward_sizes(per_half, candidates, results_RK[0].shape[1])
    halves = (values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(values1_RJ):
        _combine_rows[(triton.cdiv(rows, sizes["M"]),)](*halves, n_keys, *results_RK, rows, **sizes)


def add_to_halves(
    grad_RK: Tensor, sums_RK: Tensor, chosen_RK: Tensor, rank1_C: Tensor, rank2_C: Tensor, *results_RJ: Tensor
) -> None:
    """Writes the gradients of both halves' values; all contiguous, float32 and int32."""
    (rows, k), per_half = grad_RK.shape, results_RJ[0].shape[1]
    inputs = (grad_RK, sums_RK, chosen_RK, rank1_C, rank2_C)
    with torch.cuda.device_of(grad_RK):
        _add_to_halves[(rows,)](*inputs, *results_RJ, **_backward_sizes(per_half, k))


def _forward_sizes(per_half: int, candidates: int, k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(candidates)
    rows = max(1, _SUMS // padded)
    sizes = {"J": per_half, "C": candidates, "K": k}
    return sizes | {"M": rows, "Q": padded, "P": triton.next_power_of_2(k)}


def _backward_sizes(per_half: int, k: int) -> dict[str, int]:
    return {"J": per_half, "K": k, "A": triton.next_power_of_2(per_half), "G": _PAIRS}


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    for rows, per_half, candidates, k in ((65536, 32, 119, 32), (65536, 8, 20, 8), (9, 5, 14, 7)):
        halves = torch.empty(rows, per_half), ids(rows, per_half), torch.empty(rows, per_half), ids(rows, per_half)
        ranks, sums_RK = (ids(candidates), ids(candidates)), torch.empty(rows, k)
        combine_rows(*halves, *ranks, 1024, sums_RK, ids(rows, k), ids(rows, k))
        gradients = torch.empty(rows, per_half), torch.empty(rows, per_half)
        add_to_halves(torch.empty(rows, k), sums_RK, ids(rows, k), *ranks, *gradients)
