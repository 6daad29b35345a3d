"""Ranked top-k on the CPU, a row at a time: bound the k-th best from below, collect what reaches it, rank by counting.

Scores are compared as integers that order as the scores do (NaN first, -0.0 as 0.0). The only branch on a score is one
a block of 16; the rest vectorises. The sums of pairs are ranked here as well, not in product_topk: numba's cache of a
kernel notices changes of its own file only, so kernels that call each other must stand in one.

Letters: R rows, S scores a row, P scores padded to whole spans, G blocks of a row, K kept, N collected, C workers.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import torch
from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads

_BLOCK = 16
# A loop over whole spans of keys has no scalar remainder, which would cost more than the loop.
_SPAN = 64
#: By bytes a score: the integer dtype of its bits, and the bits of infinity.
FLOATS = {4: (torch.int32, numba.int32(0x7F800000)), 8: (torch.int64, numba.int64(0x7FF0000000000000))}


def rank_rows(scores_RS: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
    """Writes the K best of each row of fp32 or fp64 scores and their int32 indices; all contiguous, 1 <= K <= S."""
    bits, infinity = FLOATS[scores_RS.element_size()]
    room = workspace(scores_RS.shape[1], scores_RS.dtype)
    _rank_rows(scores_RS.view(bits).numpy(), infinity, values_RK.view(bits).numpy(), indices_RK.numpy(), *room)


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
    keys_C3P, places_C3P = workspace(len(rank1_C), values1_RJ.dtype)
    sums_CP = values1_RJ.new_empty(len(keys_C3P), keys_C3P.shape[-1])
    given = (values1_RJ, indices1_RJ, values2_RJ, indices2_RJ, rank1_C, rank2_C, sums_CP, sums_CP.view(bits))
    arrays = (tensor.detach().numpy() for tensor in (*given, *results_RK))
    _rank_sums(n_keys, infinity, keys_C3P, places_C3P, *arrays)


def workspace(n_keys: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """What `best_of_keys` needs, for as many workers as torch has threads: three rows of keys, three of places."""
    use_torch_threads()
    workers, padded = numba.get_num_threads(), -(-n_keys // _SPAN) * _SPAN
    keys_C3P = torch.empty(workers, 3, padded, dtype=FLOATS[dtype.itemsize][0])
    return keys_C3P.numpy(), torch.empty(workers, 3, padded, dtype=torch.int32).numpy()


@njit(nogil=True, cache=True)
def order_keys(bits_S: Any, infinity: Any, keys_P: Any) -> None:
    """Integers that order as the floats with these bits do: NaN above infinity, -0.0 equal to 0.0."""
    for s in range(bits_S.shape[0]):
        magnitude = bits_S[s] & (infinity | (infinity - 1))
        signed = -magnitude if bits_S[s] < 0 else magnitude
        keys_P[s] = infinity + 1 if magnitude > infinity else signed


@njit(nogil=True, cache=True)
def best_of_keys(keys_3P: Any, places_3P: Any, n_keys: int, infinity: Any, best_K: Any) -> None:
    """Writes where the K largest of `keys_3P[0, :n_keys]` stand, best first, equal keys by lower place."""
    keys_P, tops_P, kept_P = keys_3P[0], keys_3P[1], keys_3P[2]
    found_P, seen_P, ranked_P = places_3P[0], places_3P[1], places_3P[2]
    k, blocks = best_K.shape[0], keys_P.shape[0] // _BLOCK
    for i in range(n_keys, keys_P.shape[0]):
        keys_P[i] = -infinity - 1
    for g in range(blocks):
        top = keys_P[_BLOCK * g]
        for i in range(_BLOCK):
            top = max(top, keys_P[_BLOCK * g + i])
        tops_P[g] = top
    # Where the best of K blocks reach a bound, so do K keys; but only among many blocks is that bound a tight one.
    if blocks >= 2 * k:
        bound = _kth_bound(tops_P[:blocks], k, k // 4)
    else:
        bound = _kth_bound(keys_P, k, k // 4)
    # Written always, counted where it holds: half of these tests come out either way, and a branch would miss them.
    hits, n = 0, 0
    for g in range(blocks):
        seen_P[hits] = g
        hits += tops_P[g] >= bound
    for h in range(hits):
        first = _BLOCK * seen_P[h]
        for i in range(_BLOCK):
            found_P[n] = first + i
            n += keys_P[first + i] >= bound
    for i in range(n):
        kept_P[i] = keys_P[found_P[i]]
    if n > 2 * k + _SPAN // 2:
        n = _keep_first(kept_P[:n], found_P, k)
    padded = -(-n // _SPAN) * _SPAN
    for i in range(n, padded):
        kept_P[i] = -infinity - 1
    _rank(kept_P[:padded], found_P[:n], seen_P, ranked_P)
    for i in range(k):
        best_K[i] = ranked_P[i]


@njit(nogil=True, cache=True)
def _kth_bound(keys_N: Any, k: int, slack: int) -> Any:
    """A key that at least `k` of the keys reach, and at most `k + slack` unless they tie: bisection."""
    low, high = keys_N[0], keys_N[0]
    for i in range(keys_N.shape[0]):
        low, high = min(low, keys_N[i]), max(high, keys_N[i])
    while low < high:
        # The mean, rounded up, of two numbers whose sum may not fit; in the keys' own width, or the loop is half as
        # fast.
        middle = type(low)((low | high) - ((low ^ high) >> 1))
        count = numba.int32(0)
        for i in range(keys_N.shape[0]):
            count += numba.int32(keys_N[i] >= middle)
        if count < k:
            high = type(low)(middle - 1)
        else:
            low = middle
            if count <= k + slack:
                break
    return low


@njit(nogil=True, cache=True)
def _keep_first(kept_N: Any, found_P: Any, k: int) -> int:
    """Keeps the K best in place, of those that tie at the K-th place the first; returns K."""
    bound = _kth_bound(kept_N, k, 0)
    ties = k
    for i in range(kept_N.shape[0]):
        ties -= kept_N[i] > bound
    n = 0
    for i in range(kept_N.shape[0]):
        key, place = kept_N[i], found_P[i]
        kept_N[n], found_P[n] = key, place
        n += (key > bound) | ((key == bound) & (ties > 0))
        ties -= key == bound
    return n


@njit(nogil=True, cache=True)
def _rank(kept_P: Any, found_N: Any, seen_P: Any, ranked_P: Any) -> None:
    """A key's rank is the number of larger keys, and of equal keys before it: no sort, no branch on a key."""
    for i in range(found_N.shape[0]):
        seen_P[i] = 0
    for i in range(found_N.shape[0]):
        key = kept_P[i]
        larger = numba.int32(0)
        for j in range(kept_P.shape[0]):
            larger += numba.int32(kept_P[j] > key)
        ranked_P[larger + seen_P[larger]] = found_N[i]
        seen_P[larger] += 1


@njit(nogil=True, parallel=True, cache=True)
def _rank_rows(bits_RS: Any, infinity: Any, values_RK: Any, indices_RK: Any, keys_C3P: Any, places_C3P: Any) -> None:
    rows, n_scores = bits_RS.shape
    workers = keys_C3P.shape[0]
    for c in prange(workers):
        for r in range(rows * c // workers, rows * (c + 1) // workers):
            order_keys(bits_RS[r], infinity, keys_C3P[c, 0])
            best_of_keys(keys_C3P[c], places_C3P[c], n_scores, infinity, indices_RK[r])
            for i in range(indices_RK.shape[1]):
                values_RK[r, i] = bits_RS[r, indices_RK[r, i]]


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
                # +inf and -inf: the only way to NaN from two numbers. -inf keeps the order monotone.
                opposite = (score != score) & (first == first) & (second == second)
                scores_WP[w, c] = -math.inf if opposite else score
            order_keys(bits_WP[w, :candidates], infinity, keys_W3P[w, 0])
            best_of_keys(keys_W3P[w], places_W3P[w], candidates, infinity, chosen_RK[r])
            for i in range(sums_RK.shape[1]):
                c = chosen_RK[r, i]
                sums_RK[r, i] = scores_WP[w, c]
                ids_RK[r, i] = indices1_RJ[r, rank1_C[c]] * n_keys + indices2_RJ[r, rank2_C[c]]
