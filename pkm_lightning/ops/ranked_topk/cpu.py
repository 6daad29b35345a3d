"""ranked_topk on the CPU (numba): bound the k-th best score from below, collect what reaches it, rank by counting.

Scores are compared as integers, their sort keys, which have the order of the scores (NaN first, -0.0 equal to 0.0). The
only branch on a score is one per block of 16; the rest vectorises. Sums of pairs are ranked here as well, not in
product_topk: numba invalidates a cached kernel only when its own file changes, so kernels that call each other must be
in one file.

Letters: R rows, L scores per row, P = L padded to whole spans, G blocks of a row, M scores collected; K indices kept;
J sub-keys kept per half, C candidate pairs; W workers.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import torch
from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads

#: Scores per block whose maximum is looked at first: a cache line of float32.
_BLOCK = 16
#: Loops run over whole spans of scores: they then have no scalar remainder, which would cost more than the loop itself.
_SPAN = 64
#: By bytes per score: the integer dtype of its bits, and the bits of infinity.
FLOATS = {4: (torch.int32, numba.int32(0x7F800000)), 8: (torch.int64, numba.int64(0x7FF0000000000000))}


def rank_rows(scores_RL: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
    """Writes the K best of each row of float32 or float64 scores and their int32 indices.

    All tensors are contiguous, and 1 <= K <= L.
    """
    bits, infinity = FLOATS[scores_RL.element_size()]
    buffers = workspace(scores_RL.shape[1], scores_RL.dtype)
    _rank_rows(scores_RL.view(bits).numpy(), infinity, values_RK.view(bits).numpy(), indices_RK.numpy(), *buffers)


def rank_sums(
    values1_RJ: Tensor,
    indices1_RJ: Tensor,
    values2_RJ: Tensor,
    indices2_RJ: Tensor,
    rank1_C: Tensor,
    rank2_C: Tensor,
    n_keys: int,
    *results_RK: Tensor,
) -> None:
    """Writes sums, slot ids and candidates of the K best of the pairs (rank1[c], rank2[c]) of two ranked halves."""
    bits, infinity = FLOATS[values1_RJ.element_size()]
    keys_W3P, places_W3P = workspace(len(rank1_C), values1_RJ.dtype)
    sums_WP = values1_RJ.new_empty(len(keys_W3P), keys_W3P.shape[-1])
    inputs = (values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C, sums_WP, sums_WP.view(bits))
    arrays = (tensor.detach().numpy() for tensor in (*inputs, *results_RK))
    _rank_sums(n_keys, infinity, keys_W3P, places_W3P, *arrays)


def workspace(n_scores: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Allocates the buffers of `best_of_keys` for as many workers as torch has threads.

    Returns:
        Three rows of sort keys and three of places per worker, both (W, 3, P).
    """
    use_torch_threads()
    workers, padded = numba.get_num_threads(), -(-n_scores // _SPAN) * _SPAN
    keys_W3P = torch.empty(workers, 3, padded, dtype=FLOATS[dtype.itemsize][0])
    return keys_W3P.numpy(), torch.empty(workers, 3, padded, dtype=torch.int32).numpy()


@njit(nogil=True, cache=True)
def order_keys(bits_L: Any, infinity: Any, keys_P: Any) -> None:
    """Converts the bits of floats to sort keys: integers of the same order, NaN above infinity, -0.0 equal to 0.0."""
    for s in range(bits_L.shape[0]):
        # The bits of a float without its sign grow with its magnitude; the mask is every bit but the sign.
        magnitude = bits_L[s] & (infinity | (infinity - 1))
        signed = -magnitude if bits_L[s] < 0 else magnitude
        keys_P[s] = infinity + 1 if magnitude > infinity else signed


@njit(nogil=True, cache=True)
def best_of_keys(keys_3P: Any, places_3P: Any, n_scores: int, infinity: Any, best_K: Any) -> None:
    """Writes the places of the K largest of `keys_3P[0, :n_scores]`, best first, equal keys by lower place.

    The other rows of `keys_3P` and `places_3P` are buffers.
    """
    keys_P, tops_P, kept_P = keys_3P[0], keys_3P[1], keys_3P[2]
    places_P, buffer_P, ranked_P = places_3P[0], places_3P[1], places_3P[2]
    k, blocks = best_K.shape[0], keys_P.shape[0] // _BLOCK
    # The padding is lower than the key of -inf, so that it is never among the best.
    for i in range(n_scores, keys_P.shape[0]):
        keys_P[i] = -infinity - 1
    for g in range(blocks):
        top = keys_P[_BLOCK * g]
        for i in range(_BLOCK):
            top = max(top, keys_P[_BLOCK * g + i])
        tops_P[g] = top
    # If the maxima of K blocks reach a bound, so do K keys. With few blocks that bound would let too many keys pass.
    if blocks >= 2 * k:
        bound = _kth_bound(tops_P[:blocks], k, k // 4)
    else:
        bound = _kth_bound(keys_P, k, k // 4)
    # Each place is written in any case and the counter moves only on a hit: about half of the tests succeed, so that a
    # branch would often be predicted wrongly.
    hits, n = 0, 0
    for g in range(blocks):
        buffer_P[hits] = g
        hits += tops_P[g] >= bound
    for h in range(hits):
        first = _BLOCK * buffer_P[h]
        for i in range(_BLOCK):
            places_P[n] = first + i
            n += keys_P[first + i] >= bound
    for i in range(n):
        kept_P[i] = keys_P[places_P[i]]
    # Ranking is quadratic in n, so ties beyond twice k are cut first.
    if n > 2 * k + _SPAN // 2:
        n = _keep_first(kept_P[:n], places_P, k)
    padded = -(-n // _SPAN) * _SPAN
    for i in range(n, padded):
        kept_P[i] = -infinity - 1
    _rank(kept_P[:padded], places_P[:n], buffer_P, ranked_P)
    for i in range(k):
        best_K[i] = ranked_P[i]


@njit(nogil=True, cache=True)
def _kth_bound(keys_M: Any, k: int, slack: int) -> Any:
    """Finds by bisection a key that at least `k` of the keys reach, and at most `k + slack` unless keys tie."""
    low, high = keys_M[0], keys_M[0]
    for i in range(keys_M.shape[0]):
        low, high = min(low, keys_M[i]), max(high, keys_M[i])
    while low < high:
        # The mean, rounded up, without the sum of the two, which may overflow. It is cast to the type of the keys: in
        # int64 the comparisons with 32-bit keys would take twice as long.
        middle = type(low)((low | high) - ((low ^ high) >> 1))
        count = numba.int32(0)
        for i in range(keys_M.shape[0]):
            count += numba.int32(keys_M[i] >= middle)
        if count < k:
            high = type(low)(middle - 1)
        else:
            low = middle
            if count <= k + slack:
                break
    return low


@njit(nogil=True, cache=True)
def _keep_first(kept_M: Any, places_P: Any, k: int) -> int:
    """Keeps the K best in place, and of those that tie at the K-th place the first ones; returns K."""
    bound = _kth_bound(kept_M, k, 0)
    ties = k
    for i in range(kept_M.shape[0]):
        ties -= kept_M[i] > bound
    n = 0
    # Without branches, as above: written in any case, counted on a hit.
    for i in range(kept_M.shape[0]):
        key, place = kept_M[i], places_P[i]
        kept_M[n], places_P[n] = key, place
        n += (key > bound) | ((key == bound) & (ties > 0))
        ties -= key == bound
    return n


@njit(nogil=True, cache=True)
def _rank(kept_P: Any, places_M: Any, equal_P: Any, ranked_P: Any) -> None:
    """Writes places in the order of their keys, by counting larger keys: no sort, and no branch on a key."""
    # equal_P[r] counts the keys of rank r so far: keys that tie have the same number of larger keys.
    for i in range(places_M.shape[0]):
        equal_P[i] = 0
    for i in range(places_M.shape[0]):
        key = kept_P[i]
        larger = numba.int32(0)
        for j in range(kept_P.shape[0]):
            larger += numba.int32(kept_P[j] > key)
        ranked_P[larger + equal_P[larger]] = places_M[i]
        equal_P[larger] += 1


@njit(nogil=True, parallel=True, cache=True)
def _rank_rows(bits_RL: Any, infinity: Any, values_RK: Any, indices_RK: Any, keys_W3P: Any, places_W3P: Any) -> None:
    rows, n_scores = bits_RL.shape
    workers = keys_W3P.shape[0]
    # Each worker takes one run of rows and has its own buffers.
    for w in prange(workers):
        for r in range(rows * w // workers, rows * (w + 1) // workers):
            order_keys(bits_RL[r], infinity, keys_W3P[w, 0])
            best_of_keys(keys_W3P[w], places_W3P[w], n_scores, infinity, indices_RK[r])
            # The bits of the scores themselves, as a sort key does not keep the sign of zero or the kind of NaN.
            for i in range(indices_RK.shape[1]):
                values_RK[r, i] = bits_RL[r, indices_RK[r, i]]


@njit(nogil=True, parallel=True, cache=True)
def _rank_sums(
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
                # NaN from two numbers: (+inf) + (-inf), which counts as -inf, so that no sum grows with a rank.
                opposite = (score != score) & (first == first) & (second == second)
                scores_WP[w, c] = -math.inf if opposite else score
            # `bits_WP` is the same memory as `scores_WP`: numba cannot reinterpret a float array as integers.
            order_keys(bits_WP[w, :candidates], infinity, keys_W3P[w, 0])
            best_of_keys(keys_W3P[w], places_W3P[w], candidates, infinity, chosen_RK[r])
            for i in range(sums_RK.shape[1]):
                c = chosen_RK[r, i]
                sums_RK[r, i] = scores_WP[w, c]
                ids_RK[r, i] = indices1_RJ[r, rank1_C[c]] * n_keys + indices2_RJ[r, rank2_C[c]]
