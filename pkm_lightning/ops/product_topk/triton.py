"""The combination of two ranked halves on a GPU: a program ranks the candidate sums of its rows in registers.

Letters: R rows, J kept a half, C candidate pairs, K slots kept, M rows of a program; H, N, P: J, C and K padded to
powers of two, G pairs of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.ranked_topk.triton import below_all, pack, packed_places, packed_scores

_SUMS, _PAIRS = 512, 16  # sums of a program; pairs of a group of the gradient


@triton.jit
def _combine_rows(  # type: ignore[no-untyped-def]
    values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C, n_keys, sums_RK, ids_RK, chosen_RK, rows,
    J: tl.constexpr, C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row_M1 = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    pair_1N = tl.arange(0, N)[None, :]
    inside_MN = (row_M1 < rows) & (pair_1N < C)
    first_1N = tl.load(rank1_C + pair_1N, mask=pair_1N < C, other=0)
    second_1N = tl.load(rank2_C + pair_1N, mask=pair_1N < C, other=0)
    value1_MN = tl.load(values1_RJ + row_M1 * J + first_1N, mask=inside_MN, other=0.0)
    value2_MN = tl.load(values2_RJ + row_M1 * J + second_1N, mask=inside_MN, other=0.0)
    sums_MN = value1_MN + value2_MN
    # +inf and -inf: the only way to NaN from two numbers. -inf keeps the order monotone.
    opposite_MN = (sums_MN != sums_MN) & (value1_MN == value1_MN) & (value2_MN == value2_MN)
    sums_MN = tl.where(opposite_MN, float("-inf"), sums_MN)
    best_MP = tl.topk(tl.where(inside_MN, pack(sums_MN, pair_1N), below_all((M, N))), P)
    rank_1P = tl.arange(0, P)[None, :]
    kept_MP = (row_M1 < rows) & (rank_1P < K)
    pair_MP = packed_places(best_MP)
    first_MP = tl.load(rank1_C + pair_MP, mask=kept_MP, other=0)
    second_MP = tl.load(rank2_C + pair_MP, mask=kept_MP, other=0)
    key1_MP = tl.load(indices1_RJ + row_M1 * J + first_MP, mask=kept_MP, other=0)
    key2_MP = tl.load(indices2_RJ + row_M1 * J + second_MP, mask=kept_MP, other=0)
    tl.store(sums_RK + row_M1 * K + rank_1P, packed_scores(best_MP), mask=kept_MP)
    tl.store(ids_RK + row_M1 * K + rank_1P, key1_MP * n_keys + key2_MP, mask=kept_MP)
    tl.store(chosen_RK + row_M1 * K + rank_1P, pair_MP, mask=kept_MP)


@triton.jit
def _add_to_halves(  # type: ignore[no-untyped-def]
    grad_RK, sums_RK, chosen_RK, rank1_C, rank2_C, grad1_RJ, grad2_RJ,
    J: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Every rank of a half asks every chosen pair whether it took part: no atomic additions."""
    row = tl.program_id(0).to(tl.int64)
    rank_H = tl.arange(0, H)
    sum1_H, sum2_H = tl.zeros((H,), tl.float32), tl.zeros((H,), tl.float32)
    for begin in range(0, K, G):
        kept_G = begin + tl.arange(0, G)
        grad_G = tl.load(grad_RK + row * K + kept_G, mask=kept_G < K, other=0.0)
        constant_G = tl.load(sums_RK + row * K + kept_G, mask=kept_G < K, other=0.0) == float("-inf")
        grad_G1 = tl.where(constant_G, 0.0, grad_G)[:, None]
        pair_G = tl.load(chosen_RK + row * K + kept_G, mask=kept_G < K, other=0)
        first_G1, second_G1 = tl.load(rank1_C + pair_G)[:, None], tl.load(rank2_C + pair_G)[:, None]
        sum1_H += tl.sum(tl.where(first_G1 == rank_H[None, :], grad_G1, 0.0), 0)
        sum2_H += tl.sum(tl.where(second_G1 == rank_H[None, :], grad_G1, 0.0), 0)
    tl.store(grad1_RJ + row * J + rank_H, sum1_H, mask=rank_H < J)
    tl.store(grad2_RJ + row * J + rank_H, sum2_H, mask=rank_H < J)


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
    """Writes the sums, slot ids and candidates of the K best pairs of every row; all contiguous, fp32 and int32."""
    (rows, per_half), candidates = values1_RJ.shape, len(rank1_C)
    sizes = _forward_sizes(per_half, candidates, results_RK[0].shape[1])
    halves = (values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C)
    with torch.cuda.device_of(values1_RJ):
        _combine_rows[(triton.cdiv(rows, sizes["M"]),)](*halves, n_keys, *results_RK, rows, **sizes)


def add_to_halves(
    grad_RK: Tensor, sums_RK: Tensor, chosen_RK: Tensor, rank1_C: Tensor, rank2_C: Tensor, *results_RJ: Tensor
) -> None:
    """Writes the gradients of both halves' values; all contiguous, fp32 and int32."""
    (rows, k), per_half = grad_RK.shape, results_RJ[0].shape[1]
    given = (grad_RK, sums_RK, chosen_RK, rank1_C, rank2_C)
    with torch.cuda.device_of(grad_RK):
        _add_to_halves[(rows,)](*given, *results_RJ, **_backward_sizes(per_half, k))


def _forward_sizes(per_half: int, candidates: int, k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(candidates)
    rows = max(1, _SUMS // padded)
    sizes = {"J": per_half, "C": candidates, "K": k}
    return sizes | {"M": rows, "N": padded, "P": triton.next_power_of_2(k)}


def _backward_sizes(per_half: int, k: int) -> dict[str, int]:
    return {"J": per_half, "K": k, "H": triton.next_power_of_2(per_half), "G": _PAIRS}


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, int]]]:
    """Kernels with argument types and constants, for compilation ahead of time without a GPU."""
    floats = ("values1_RJ", "values2_RJ", "sums_RK", "grad_RK", "grad1_RJ", "grad2_RJ")
    integers = ("indices1_RJ", "indices2_RJ", "rank1_C", "rank2_C", "ids_RK", "chosen_RK")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "*i32") | {"n_keys": "i32", "rows": "i32"}
    cases = []
    for per_half, candidates, k in ((32, 119, 32), (5, 14, 7)):
        sizes = (_forward_sizes(per_half, candidates, k), _backward_sizes(per_half, k))
        for kernel, constants in zip((_combine_rows, _add_to_halves), sizes, strict=True):
            runtime = {name: types[name] for name in kernel.arg_names if name not in constants}
            cases.append((kernel, runtime, constants))
    return cases
