"""half_topk on the CPU: scores of one chunk at a time, ranked while they are in the cache (numba).

The gradient of a query is a sum over its K keys, that of a key a sum over the queries that chose it. Neither needs the
scores again.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query, C scores of a chunk, which are those
of U tokens of Y entries.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import rank_rows

#: Scores of a chunk: 2 MiB of float32, which fit a share of the last-level cache or the L2 caches of two cores.
_CHUNK_SCORES = 2**19
#: Columns per task: two whole cache lines of float32, and enough tasks for many threads even with one head.
_COLUMNS = 32


def best_keys(q_XTF: Tensor, keys_XSF: Tensor, values_XTK: Tensor, indices_XTK: Tensor, precision: str) -> None:
    """Writes the K best scores of every query and the indices of their keys; all tensors contiguous, always IEEE."""
    entries, tokens, n_keys = len(q_XTF), q_XTF.shape[1], keys_XSF.shape[1]
    t_step = max(1, min(tokens, _CHUNK_SCORES // n_keys))
    # Few tokens (decoding) do not fill a chunk, so several entries share one.
    x_step = max(1, _CHUNK_SCORES // (n_keys * t_step)) if t_step == tokens else 1
    # One buffer for all chunks: a new one each time would leave the cache.
    buffer_C = q_XTF.new_empty(min(x_step, entries) * t_step * n_keys)
    for x in range(0, entries, x_step):
        for t in range(0, tokens, t_step):
            # A part of one entry, or several whole entries: either way the chunk of the results is contiguous.
            q_YUF, values_YUK, indices_YUK = (
                whole[x : x + x_step, t : t + t_step] for whole in (q_XTF, values_XTK, indices_XTK)
            )
            scores_YUS = buffer_C[: q_YUF.shape[0] * q_YUF.shape[1] * n_keys].view(*q_YUF.shape[:2], n_keys)
            torch.bmm(q_YUF, keys_XSF[x : x + x_step].mT, out=scores_YUS)
            rank_rows(*(chunk.flatten(0, 1) for chunk in (scores_YUS, values_YUK, indices_YUK)))


def add_gradients(*tensors: Tensor) -> None:
    """Adds to the last two of (grad, indices, q, keys, grad of q, grad of keys); all tensors contiguous."""
    use_torch_threads()
    _add_gradients(*map(numpy_view, tensors))


@njit(nogil=True, parallel=True, cache=True)
def _add_gradients(
    grad_XTK: Any, indices_XTK: Any, q_XTF: Any, keys_XSF: Any, q_grad_XTF: Any, keys_grad_XSF: Any
) -> None:
    entries, tokens, dim = q_XTF.shape
    pieces = -(-dim // _COLUMNS)
    # A task covers some columns of all rows of an entry. No two tasks write the same number, and each number is summed
    # in the order of the tokens, so that the result does not depend on the number of threads.
    for piece in prange(entries * pieces):
        x, start = piece // pieces, piece % pieces * _COLUMNS
        stop = min(start + _COLUMNS, dim)
        for t in range(tokens):
            q_F, q_grad_F = q_XTF[x, t, start:stop], q_grad_XTF[x, t, start:stop]
            for i in range(grad_XTK.shape[2]):
                grad, s = grad_XTK[x, t, i], indices_XTK[x, t, i]
                keys_F, keys_grad_F = keys_XSF[x, s, start:stop], keys_grad_XSF[x, s, start:stop]
                for f in range(stop - start):
                    q_grad_F[f] += grad * keys_F[f]
                    keys_grad_F[f] += grad * q_F[f]
