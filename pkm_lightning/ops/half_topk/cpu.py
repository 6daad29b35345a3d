"""half_topk on the CPU: scores of one chunk at a time, ranked while they are in the cache (numba).

The gradient of a query is a sum over its K keys, that of a key a sum over the queries that chose it. Neither needs the
scores again.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query, C scores of a chunk, which are those
of U tokens of Y entries, or of as many as there are sets of keys.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import rank_scores

#: Scores of a chunk: 1 MiB of float32, which fits the L2 cache of a core beside what else it holds.
_CHUNK_SCORES = 2**18
#: Columns per task: two whole cache lines of float32, and enough tasks for many threads even with one head.
_COLUMNS = 32


def best_keys(q_XTF: Tensor, keys_XSF: Tensor, values_XTK: Tensor, indices_XTK: Tensor, precision: str) -> None:
    """Writes the K best scores of every query and the indices of their keys; always IEEE."""
    entries, tokens, k = values_XTK.shape
    results_TXK = [torch.empty(tokens, entries, k, dtype=result.dtype) for result in (values_XTK, indices_XTK)]
    best_keys_by_token(q_XTF.transpose(0, 1), keys_XSF, *results_TXK)
    values_XTK.copy_(results_TXK[0].transpose(0, 1))
    indices_XTK.copy_(results_TXK[1].transpose(0, 1))


def best_keys_by_token(q_TXF: Tensor, keys_YSF: Tensor, values_TXK: Tensor, indices_TXK: Tensor) -> None:
    """Writes the same in the order of the tokens; entry x has the keys x % Y.

    Of queries and keys only the last dimension need be contiguous.
    """
    (tokens, entries, _), (sets, n_keys, _) = q_TXF.shape, keys_YSF.shape
    t_step = max(1, min(tokens, _CHUNK_SCORES // n_keys))
    # Few tokens (decoding) do not fill a chunk, so several entries share one.
    x_step = max(1, min(sets, _CHUNK_SCORES // (n_keys * t_step))) if t_step == tokens else 1
    # One buffer for all chunks: a new one each time would leave the cache.
    buffer_C = q_TXF.new_empty(x_step * t_step * n_keys)
    for x in range(0, entries, x_step):
        q_YTF = q_TXF[:, x : x + x_step].transpose(0, 1)
        keys_YFS = keys_YSF[x % sets : x % sets + len(q_YTF)].mT
        for t in range(0, tokens, t_step):
            q_YUF = q_YTF[:, t : t + t_step]
            scores_YUS = buffer_C[: q_YUF.shape[0] * q_YUF.shape[1] * n_keys].view(*q_YUF.shape[:2], n_keys)
            torch.bmm(q_YUF, keys_YFS, out=scores_YUS)
            rank_scores(scores_YUS, values_TXK[t : t + t_step], indices_TXK[t : t + t_step], x)


def add_gradients(
    grad_XTK: Tensor, indices_XTK: Tensor, q_XTF: Tensor, keys_XSF: Tensor, q_grad_XTF: Tensor, keys_grad_XSF: Tensor
) -> None:
    """Writes the gradient of the queries, and adds to that of the keys; all tensors contiguous."""
    grad_TXK, indices_TXK, q_TXF = (x.transpose(0, 1).contiguous() for x in (grad_XTK, indices_XTK, q_XTF))
    q_grad_TXF = torch.empty_like(q_TXF)
    add_gradients_by_token(grad_TXK, indices_TXK, q_TXF, keys_XSF, q_grad_TXF, keys_grad_XSF)
    q_grad_XTF.copy_(q_grad_TXF.transpose(0, 1))


def add_gradients_by_token(*tensors: Tensor) -> None:
    """Does the same for (grad, indices, q, keys, grad of q, grad of keys) in the order of `best_keys_by_token`."""
    use_torch_threads()
    _add_gradients(*map(numpy_view, tensors), ALL)


@njit(**KERNEL)
def _add_gradients(
    grad_TXK: Any, indices_TXK: Any, q_TXF: Any, keys_YSF: Any, q_grad_TXF: Any, keys_grad_YSF: Any, worker: int
) -> None:
    (tokens, entries, k), (sets, _, dim) = grad_TXK.shape, keys_YSF.shape
    pieces = -(-dim // _COLUMNS)
    first, last = share(sets * pieces, worker)
    # A task covers some columns of all rows of one set of keys. No two tasks write the same number, and each number is
    # summed in the order of entries and tokens, so that the result does not depend on the number of threads.
    for piece in range(first, last):
        y, start = piece // pieces, piece % pieces * _COLUMNS
        stop = min(start + _COLUMNS, dim)
        for x in range(y, entries, sets):
            for t in range(tokens):
                q_F, q_grad_F = q_TXF[t, x, start:stop], q_grad_TXF[t, x, start:stop]
                for f in range(stop - start):
                    q_grad_F[f] = 0
                for i in range(k):
                    grad, s = grad_TXK[t, x, i], indices_TXK[t, x, i]
                    keys_F, keys_grad_F = keys_YSF[y, s, start:stop], keys_grad_YSF[y, s, start:stop]
                    # Two loops: a loop that writes two arrays is not vectorised.
                    for f in range(stop - start):
                        q_grad_F[f] += grad * keys_F[f]
                    for f in range(stop - start):
                        keys_grad_F[f] += grad * q_F[f]
