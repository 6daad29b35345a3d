"""The combination of two ranked halves on the CPU: the sums of a row's candidates stay in the nearest cache (numba).

Letters: R rows, J kept a half, C candidate pairs, K slots kept, W workers, P padded.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import FLOATS, best_of_keys, order_keys, workspace


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
    """Writes the sums, slot ids and candidates of the K best pairs of every row; all contiguous."""
    bits, infinity = FLOATS[values1_RJ.element_size()]
    keys_W3P, places_W3P = workspace(len(rank1_C), values1_RJ.dtype)
    scores_WP = values1_RJ.new_empty(len(keys_W3P), keys_W3P.shape[-1])
    given = (values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C, scores_WP, scores_WP.view(bits))
    arrays = (tensor.detach().numpy() for tensor in (*given, *results_RK))
    _combine_rows(n_keys, infinity, keys_W3P, places_W3P, *arrays)


def add_to_halves(*tensors: Tensor) -> None:
    """Adds to the last two of (grad, sums, candidates, rank 1, rank 2, grad of half 1, of half 2), all contiguous."""
    use_torch_threads()
    _add_to_halves(*(tensor.detach().numpy() for tensor in tensors))


@njit(nogil=True, parallel=True, cache=True)
def _combine_rows(
    n_keys: int,
    infinity: Any,
    keys_W3P: Any,
    places_W3P: Any,
    values1_RJ: Any,
    indices1_RJ: Any,
    values2_RJ: Any,
    indices2_RJ: Any,
    rank1_C: Any,
    rank2_C: Any,
    scores_WP: Any,
    bits_WP: Any,
    sums_RK: Any,
    ids_RK: Any,
    chosen_RK: Any,
) -> None:
    rows, workers, candidates = sums_RK.shape[0], scores_WP.shape[0], rank1_C.shape[0]
    for w in prange(workers):
        for r in range(rows * w // workers, rows * (w + 1) // workers):
            for c in range(candidates):
                first, second = values1_RJ[r, rank1_C[c]], values2_RJ[r, rank2_C[c]]
                score = first + second
                # +inf and -inf: the only way to NaN from two numbers. -inf keeps the order monotone.
                opposite = (score != score) & (first == first) & (second == second)
                scores_WP[w, c] = -math.inf if opposite else score
            order_keys(bits_WP[w, :candidates], infinity, keys_W3P[w, 0])
            best_of_keys(keys_W3P[w], places_W3P[w], candidates, infinity, chosen_RK[r])
            for i in range(sums_RK.shape[1]):
                c = chosen_RK[r, i]
                sums_RK[r, i] = scores_WP[w, c]
                ids_RK[r, i] = indices1_RJ[r, rank1_C[c]] * n_keys + indices2_RJ[r, rank2_C[c]]


@njit(nogil=True, parallel=True, cache=True)
def _add_to_halves(
    grad_RK: Any, sums_RK: Any, chosen_RK: Any, rank1_C: Any, rank2_C: Any, grad1_RJ: Any, grad2_RJ: Any
) -> None:
    for r in prange(grad_RK.shape[0]):
        for i in range(grad_RK.shape[1]):
            if sums_RK[r, i] != -math.inf:
                c = chosen_RK[r, i]
                grad1_RJ[r, rank1_C[c]] += grad_RK[r, i]
                grad2_RJ[r, rank2_C[c]] += grad_RK[r, i]
