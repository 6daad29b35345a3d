"""product_combine on the CPU (numba); the ranking of sums is in `ranked_topk/cpu.py` with the ranking kernels.

Letters: R rows, J sub-keys kept per half, C candidate pairs; K slots kept; 2 is the two halves.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import empty_array, numpy_view
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.product_topk.candidates import candidate_pairs
from pkm_lightning.ops.ranked_topk.cpu import rank_sums


def combine_rows(
    values1_RJ: Tensor,
    indices1_RJ: Tensor,
    values2_RJ: Tensor,
    indices2_RJ: Tensor,
    _rank1_C: Tensor,
    _rank2_C: Tensor,
    n_keys: int,
    *results_RK: Tensor,
) -> None:
    """Writes the sums, slot ids and candidates of the K best pairs of every row; all tensors contiguous."""
    values_R2J, indices_R2J = torch.stack([values1_RJ, values2_RJ], 1), torch.stack([indices1_RJ, indices2_RJ], 1)
    combine_halves(values_R2J, indices_R2J, n_keys, *results_RK)


def combine_halves(values_R2J: Tensor, indices_R2J: Tensor, n_keys: int, *results_RK: Tensor) -> None:
    """Does the same for halves that lie side by side."""
    ranks = candidate_arrays(results_RK[0].shape[1], values_R2J.shape[2])
    rank_sums(values_R2J, indices_R2J, *ranks, n_keys, *results_RK)


def add_to_halves(
    grad_RK: Tensor,
    sums_RK: Tensor,
    chosen_RK: Tensor,
    _rank1_C: Tensor,
    _rank2_C: Tensor,
    grad1_RJ: Tensor,
    grad2_RJ: Tensor,
) -> None:
    """Writes the gradients of both halves' values; all tensors contiguous."""
    grad_R2J = grad_RK.new_empty(len(grad_RK), 2, grad1_RJ.shape[1])
    split_gradient(grad_RK, sums_RK, chosen_RK, grad_R2J)
    grad1_RJ.copy_(grad_R2J[:, 0])
    grad2_RJ.copy_(grad_R2J[:, 1])


def split_gradient(grad_RK: Tensor, sums_RK: Tensor, chosen_RK: Tensor, grad_R2J: Tensor) -> None:
    """Does the same for halves that lie side by side."""
    use_torch_threads()
    ranks = candidate_arrays(grad_RK.shape[1], grad_R2J.shape[2])
    _split_gradient(*map(numpy_view, (grad_RK, sums_RK, chosen_RK)), *ranks, numpy_view(grad_R2J), ALL)


@functools.lru_cache(maxsize=64)
def candidate_arrays(k: int, per_half: int) -> tuple[Any, Any]:
    """Returns the ranks of `candidate_pairs` as arrays, which no fake mode can turn into fake tensors."""
    pairs = candidate_pairs(k, per_half)
    arrays = empty_array((len(pairs),), "i4"), empty_array((len(pairs),), "i4")
    for array, ranks in zip(arrays, zip(*pairs, strict=True), strict=True):
        array[:] = ranks
    return arrays


@njit(**KERNEL)
def _split_gradient(
    grad_RK: Any, sums_RK: Any, chosen_RK: Any, rank1_C: Any, rank2_C: Any, grad_R2J: Any, worker: int
) -> None:
    first, last = share(grad_RK.shape[0], worker)
    # A thread owns whole rows, so that the slots of a row are added in one order.
    for r in range(first, last):
        for j in range(grad_R2J.shape[2]):
            grad_R2J[r, 0, j], grad_R2J[r, 1, j] = 0, 0
        for i in range(grad_RK.shape[1]):
            # A sum of -inf is a constant: it may have been set, for (+inf) + (-inf).
            if sums_RK[r, i] != -math.inf:
                c = chosen_RK[r, i]
                grad_R2J[r, 0, rank1_C[c]] += grad_RK[r, i]
                grad_R2J[r, 1, rank2_C[c]] += grad_RK[r, i]
