"""ranked_topk on the CPU (numba): bound the k-th score from below, collect what reaches it, rank by counting.

Scores are compared as integers, their sort keys, which have the order of the scores (NaN first, -0.0 equal to 0.0). No
branch depends on a single score, as half of them would be predicted wrongly. Sums of pairs are ranked here as well, not
in product_topk: numba invalidates a cached kernel only when its own file changes, so kernels that call each other must
be in one file.

Letters: R rows, L scores per row, P = L padded to whole spans, M scores collected; K indices kept; X rows per token, of
which Y are ranked; F dimension of a half key, S sub-keys of a set, J sub-keys kept per half, C candidate pairs; W
workers.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import empty_array, numpy_view
from pkm_lightning.ops.numba_intrinsics import float_bits
from pkm_lightning.ops.numba_kernels import ALL, CALLED, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads

# Loops over sort keys run over whole spans: they then have no scalar remainder, which would cost more than the loop.
_SPAN = 64
# Few keys are compared with each other in shorter runs.
_RUN = 16
# The bits of infinity by bytes per score.
_INFINITY = {4: numba.int32(0x7F800000), 8: numba.int64(0x7FF0000000000000)}


def rank_rows(scores_RL: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
    """Writes the K best of each row of float32 or float64 scores and their int32 indices.

    All tensors are contiguous, and 1 <= K <= L.
    """
    rank_scores(scores_RL.unsqueeze(0), values_RK.unsqueeze(1), indices_RK.unsqueeze(1), 0)


def rank_scores(scores_YTL: Tensor, values_TXK: Tensor, indices_TXK: Tensor, first: int) -> None:
    """Writes the K best of the float32 or float64 scores of (y, t), and their int32 indices, to (t, first + y).

    All tensors are contiguous, and 1 <= K <= L.
    """
    arrays = map(numpy_view, (scores_YTL, values_TXK, indices_TXK))
    infinity = _INFINITY[scores_YTL.element_size()]
    best_rows(*arrays, first, infinity, *workspace(scores_YTL.shape[2], scores_YTL.dtype), ALL)


def rank_sums(
    values_R2J: Tensor, indices_R2J: Tensor, rank1_C: Any, rank2_C: Any, n_keys: int, *results_RK: Tensor
) -> None:
    """Writes sums, slot ids and candidates of the K best of the pairs (rank1[c], rank2[c]) of two ranked halves.

    All tensors are contiguous; the ranks are arrays.
    """
    infinity = _INFINITY[values_R2J.element_size()]
    arrays = (part.numpy() for part in (values_R2J, indices_R2J, *results_RK))
    best_sums(n_keys, infinity, *score_workspace(len(rank1_C), values_R2J.dtype), rank1_C, rank2_C, *arrays, ALL)


def search(q_TXF: Tensor, keys_YFS: Tensor, rank1_C: Any, rank2_C: Any, *results: Tensor) -> None:
    """Scores, ranks and adds token by token, X = 2 * H half queries of each; the keys of x are those of x % Y.

    Writes sums, slot ids and candidates (T, H, K), and the sub-keys kept per half query (T, X, J). All tensors are
    contiguous; the ranks are arrays.
    """
    infinity = _INFINITY[q_TXF.element_size()]
    scores, sums = (score_workspace(n, q_TXF.dtype) for n in (keys_YFS.shape[2], len(rank1_C)))
    best_W2J = q_TXF.new_empty(len(scores[0]), 2, results[3].shape[2]).numpy()
    arrays = numpy_view(q_TXF), numpy_view(keys_YFS), *(result.numpy() for result in results)
    best_slots(infinity, *scores, *sums, best_W2J, rank1_C, rank2_C, *arrays, ALL)


def score_workspace(n_scores: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Allocates a `workspace`, and the scores of every worker (W, P)."""
    keys_W3P, places_W3P = workspace(n_scores, dtype)
    return keys_W3P, places_W3P, empty_array(keys_W3P.shape[::2], f"f{dtype.itemsize}")


def workspace(n_scores: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Allocates the buffers of `best_of_keys` for as many workers as torch has threads.

    Returns:
        Three rows of sort keys and three of places per worker, both (W, 3, P).
    """
    use_torch_threads()
    workers, padded = numba.get_num_threads(), -(-n_scores // _SPAN) * _SPAN
    size = dtype.itemsize
    return empty_array((workers, 3, padded), f"i{size}"), empty_array((workers, 3, padded), "i4")


@njit(**CALLED)
def order_keys(scores_L: Any, infinity: Any, keys_P: Any) -> None:
    """Converts floats to sort keys: integers of the same order, NaN above infinity, -0.0 equal to 0.0."""
    # Casts, since numba computes with integers of 64 bits, which would halve the keys per register.
    kind = type(infinity)
    # The bits of a float without its sign grow with its magnitude; the mask is every bit but the sign.
    mask, nan = kind(infinity | (infinity - 1)), kind(infinity + 1)
    for s in range(scores_L.shape[0]):
        bits = float_bits(scores_L[s])
        magnitude = kind(bits & mask)
        signed = kind(-magnitude) if bits < 0 else magnitude
        keys_P[s] = nan if magnitude > infinity else signed


@njit(**CALLED)
def best_of_keys(keys_3P: Any, places_3P: Any, n_scores: int, infinity: Any, best_K: Any) -> None:
    """Writes the places of the K largest of `keys_3P[0, :n_scores]`, best first, equal keys by lower place.

    The other rows of `keys_3P` and `places_3P` are buffers.
    """
    keys_P, tops_P, kept_P = keys_3P[0], keys_3P[1], keys_3P[2]
    places_P, ranked_P, ranks_P = places_3P[0], places_3P[1], places_3P[2]
    k = best_K.shape[0]
    # The padding is lower than the key of -inf, so that it is never among the best.
    for i in range(n_scores, keys_P.shape[0]):
        keys_P[i] = -infinity - 1
    if n_scores <= _most_ranked(k):
        n = n_scores
        for i in range(n):
            kept_P[i], places_P[i] = keys_P[i], i
    else:
        n = _collect(keys_P, _bound(keys_P, tops_P, k), kept_P, places_P)
        if n > _most_ranked(k):
            n = _keep_first(kept_P[:n], places_P, k)
    _rank(kept_P, places_P[:n], infinity, ranks_P, ranked_P)
    for i in range(k):
        best_K[i] = ranked_P[i]


@njit(**CALLED)
def _most_ranked(k: int) -> int:
    """Limits the keys that are ranked, which takes time quadratic in them."""
    return 2 * k + _SPAN // 2


@njit(**CALLED)
def _bound(keys_P: Any, tops_P: Any, k: int) -> Any:
    """Finds a bound that at least K keys reach, and not many more."""
    # Keys are dealt to lanes like cards: if the largest keys of K lanes reach a bound, so do K keys. With fewer than
    # 2 K lanes, or few keys per lane, too many other keys would pass.
    lanes = _RUN if 2 * k <= _RUN else -(-2 * k // _SPAN) * _SPAN
    if keys_P.shape[0] < 2 * lanes:
        return _kth_bound(keys_P, k, k + k // 4)
    for i in range(lanes):
        tops_P[i] = keys_P[i]
    for first in range(lanes, keys_P.shape[0] // lanes * lanes, lanes):
        for i in range(lanes):
            tops_P[i] = max(tops_P[i], keys_P[first + i])
    return _kth_bound(tops_P[:lanes], k, k + k // 4)


@njit(**CALLED)
def _collect(keys_P: Any, bound: Any, kept_P: Any, places_P: Any) -> int:
    """Writes the keys that reach `bound`, and their places in rising order; returns their number."""
    n = 0
    for i in range(keys_P.shape[0]):
        # Without a branch: written in any case, counted on a hit.
        places_P[n] = i
        n += keys_P[i] >= bound
    for i in range(n):
        kept_P[i] = keys_P[places_P[i]]
    return n


@njit(**CALLED)
def _kth_bound(keys_M: Any, k: int, most: int) -> Any:
    """Finds by bisection a key that at least `k` of the keys reach, and no more than `most` unless keys tie."""
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
            if count <= most:
                break
    return low


@njit(**CALLED)
def _keep_first(kept_M: Any, places_P: Any, k: int) -> int:
    """Keeps the K best in place, and of those that tie at the K-th place the first ones; returns K."""
    bound = _kth_bound(kept_M, k, k)
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


@njit(**CALLED)
def _rank(kept_P: Any, places_M: Any, infinity: Any, equal_P: Any, ranked_P: Any) -> None:
    """Writes places in the order of their keys, by counting larger keys: no sort, and no branch on a key."""
    n = places_M.shape[0]
    padded = -(-n // _RUN) * _RUN
    for i in range(n, padded):
        kept_P[i] = -infinity - 1
    # equal_P[r] counts the keys of rank r so far: keys that tie have the same number of larger keys.
    for i in range(n):
        equal_P[i] = 0
    for i in range(n):
        key = kept_P[i]
        larger = numba.int32(0)
        for j in range(padded):
            larger += numba.int32(kept_P[j] > key)
        ranked_P[larger + equal_P[larger]] = places_M[i]
        equal_P[larger] += 1


@njit(**KERNEL)
def best_rows(
    scores_YTL: Any,
    values_TXK: Any,
    indices_TXK: Any,
    first: int,
    infinity: Any,
    keys_W3P: Any,
    places_W3P: Any,
    worker: int,
) -> None:
    """Writes the K best scores of (y, t) and their places to (t, first + y)."""
    tokens, n_scores = scores_YTL.shape[1:]
    rows, workers = scores_YTL.shape[0] * tokens, keys_W3P.shape[0]
    # Each worker takes one run of rows and has its own buffers.
    first_worker, last_worker = share(workers, worker)
    for w in range(first_worker, last_worker):
        start, stop = rows * w // workers, rows * (w + 1) // workers
        # Counted, as a division per row takes a tenth of its time.
        y, t = start // max(tokens, 1), start % max(tokens, 1)
        for _ in range(start, stop):
            scores_L, best_K = scores_YTL[y, t], indices_TXK[t, first + y]
            order_keys(scores_L, infinity, keys_W3P[w, 0])
            best_of_keys(keys_W3P[w], places_W3P[w], n_scores, infinity, best_K)
            # From the scores themselves, as a sort key does not keep the sign of zero or the kind of NaN.
            for i in range(best_K.shape[0]):
                values_TXK[t, first + y, i] = scores_L[best_K[i]]
            t += 1
            if t == tokens:
                y, t = y + 1, 0


@njit(**CALLED)
def _best_pairs(
    values_2J: Any,
    indices_2J: Any,
    rank1_C: Any,
    rank2_C: Any,
    n_keys: int,
    infinity: Any,
    keys_3P: Any,
    places_3P: Any,
    scores_P: Any,
    sums_K: Any,
    ids_K: Any,
    chosen_K: Any,
) -> None:
    candidates = rank1_C.shape[0]
    for c in range(candidates):
        first, second = values_2J[0, rank1_C[c]], values_2J[1, rank2_C[c]]
        score = first + second
        # NaN from two numbers: (+inf) + (-inf), which counts as -inf, so that no sum grows with a rank.
        opposite = (score != score) & (first == first) & (second == second)
        scores_P[c] = -math.inf if opposite else score
    order_keys(scores_P[:candidates], infinity, keys_3P[0])
    best_of_keys(keys_3P, places_3P, candidates, infinity, chosen_K)
    for i in range(sums_K.shape[0]):
        c = chosen_K[i]
        sums_K[i] = scores_P[c]
        ids_K[i] = indices_2J[0, rank1_C[c]] * n_keys + indices_2J[1, rank2_C[c]]


@njit(**KERNEL)
def best_sums(
    n_keys: int,
    infinity: Any,
    keys_W3P: Any,
    places_W3P: Any,
    scores_WP: Any,
    rank1_C: Any,
    rank2_C: Any,
    values_R2J: Any,
    indices_R2J: Any,
    sums_RK: Any,
    ids_RK: Any,
    chosen_RK: Any,
    worker: int,
) -> None:
    rows, workers = sums_RK.shape[0], scores_WP.shape[0]
    first_worker, last_worker = share(workers, worker)
    for w in range(first_worker, last_worker):
        for r in range(rows * w // workers, rows * (w + 1) // workers):
            _best_pairs(
                values_R2J[r], indices_R2J[r], rank1_C, rank2_C, n_keys, infinity, keys_W3P[w], places_W3P[w],
                scores_WP[w], sums_RK[r], ids_RK[r], chosen_RK[r],
            )  # fmt: skip


# Fused multiply-adds in the order of the columns, as a matrix product has them.
@njit(**CALLED, fastmath={"contract"})
def _score(q_F: Any, keys_FS: Any, scores_P: Any) -> None:
    """Writes the inner products of a query with all keys of a set."""
    (dim, n_keys), whole = keys_FS.shape, keys_FS.shape[0] // 4 * 4
    for s in range(n_keys):
        scores_P[s] = 0
    # Four columns at a time, as the scores are loaded and stored each time.
    for f in range(0, whole, 4):
        q0, q1, q2, q3 = q_F[f], q_F[f + 1], q_F[f + 2], q_F[f + 3]
        k0_S, k1_S, k2_S, k3_S = keys_FS[f], keys_FS[f + 1], keys_FS[f + 2], keys_FS[f + 3]
        for s in range(n_keys):
            scores_P[s] = (((scores_P[s] + q0 * k0_S[s]) + q1 * k1_S[s]) + q2 * k2_S[s]) + q3 * k3_S[s]
    for f in range(whole, dim):
        for s in range(n_keys):
            scores_P[s] += q_F[f] * keys_FS[f, s]


@njit(**KERNEL)
def best_slots(
    infinity: Any,
    keys_W3P: Any,
    places_W3P: Any,
    scores_WP: Any,
    sum_keys_W3P: Any,
    sum_places_W3P: Any,
    sum_scores_WP: Any,
    best_W2J: Any,
    rank1_C: Any,
    rank2_C: Any,
    q_TXF: Any,
    keys_YFS: Any,
    sums_THK: Any,
    ids_THK: Any,
    chosen_THK: Any,
    indices_TXJ: Any,
    worker: int,
) -> None:
    (tokens, heads, _), (sets, _, n_keys), workers = sums_THK.shape, keys_YFS.shape, scores_WP.shape[0]
    first_worker, last_worker = share(workers, worker)
    for w in range(first_worker, last_worker):
        best_2J = best_W2J[w]
        for t in range(tokens * w // workers, tokens * (w + 1) // workers):
            for h in range(heads):
                for half in range(2):
                    x = 2 * h + half
                    _score(q_TXF[t, x], keys_YFS[x % sets], scores_WP[w])
                    order_keys(scores_WP[w, :n_keys], infinity, keys_W3P[w, 0])
                    best_of_keys(keys_W3P[w], places_W3P[w], n_keys, infinity, indices_TXJ[t, x])
                    for j in range(best_2J.shape[1]):
                        best_2J[half, j] = scores_WP[w, indices_TXJ[t, x, j]]
                _best_pairs(
                    best_2J, indices_TXJ[t, 2 * h : 2 * h + 2], rank1_C, rank2_C, n_keys, infinity, sum_keys_W3P[w],
                    sum_places_W3P[w], sum_scores_WP[w], sums_THK[t, h], ids_THK[t, h],
                    chosen_THK[t, h],
                )  # fmt: skip
