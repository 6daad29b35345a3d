"""The best keys of every query on the CPU: scores a chunk at a time, ranked while they lie in the cache (numba).

The gradient of a query is a sum of K keys, that of a key a sum over the queries that chose it: neither needs scores.

Letters: X heads and halves, T tokens, E dimension of a key, S keys, K kept, C scores of a chunk of U tokens
of Y entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import rank_rows

_CHUNK_SCORES = 2**19  # 2 MiB of fp32, a share of the last cache level or of two cores' second
# Columns that one worker takes: whole cache lines, and enough pieces for many workers even with one head.
_COLUMNS = 32


def best_keys(q_XTE: Tensor, keys_XSE: Tensor, values_XTK: Tensor, indices_XTK: Tensor) -> None:
    """Writes the K best scores of every query and their keys; all contiguous."""
    entries, tokens, n_keys = len(q_XTE), q_XTE.shape[1], keys_XSE.shape[1]
    # Few tokens (decoding) are scored for several heads at once.
    t_step = max(1, min(tokens, _CHUNK_SCORES // n_keys))
    x_step = max(1, _CHUNK_SCORES // (n_keys * t_step)) if t_step == tokens else 1
    buffer_C = q_XTE.new_empty(min(x_step, entries) * t_step * n_keys)
    for x in range(0, entries, x_step):
        for t in range(0, tokens, t_step):
            # One head in part, or several as a whole: a chunk of the results is contiguous either way.
            q_YUE, values_YUK, indices_YUK = (
                whole[x : x + x_step, t : t + t_step] for whole in (q_XTE, values_XTK, indices_XTK)
            )
            scores_YUS = buffer_C[: q_YUE.shape[0] * q_YUE.shape[1] * n_keys].view(*q_YUE.shape[:2], n_keys)
            torch.bmm(q_YUE, keys_XSE[x : x + x_step].mT, out=scores_YUS)
            rank_rows(*(chunk.flatten(0, 1) for chunk in (scores_YUS, values_YUK, indices_YUK)))


def add_gradients(*tensors: Tensor) -> None:
    """Adds to the last two of (grad, indices, q, keys, grad of q, grad of keys), all contiguous."""
    use_torch_threads()
    # A tensor whose memory FSDP2 takes back after use must not be seen by `.numpy()`, which forbids that for good.
    _add_gradients(*(np.from_dlpack(tensor.detach()) for tensor in tensors))


@njit(nogil=True, parallel=True, cache=True)
def _add_gradients(
    grad_XTK: Any, indices_XTK: Any, q_XTE: Any, keys_XSE: Any, q_grad_XTE: Any, keys_grad_XSE: Any
) -> None:
    entries, tokens, dim = q_XTE.shape
    pieces = -(-dim // _COLUMNS)
    # A worker owns its columns of all rows: no two write one number, and each is summed in the order of the tokens.
    for piece in prange(entries * pieces):
        x, start = piece // pieces, piece % pieces * _COLUMNS
        stop = min(start + _COLUMNS, dim)
        for t in range(tokens):
            q_E, q_grad_E = q_XTE[x, t, start:stop], q_grad_XTE[x, t, start:stop]
            for i in range(grad_XTK.shape[2]):
                grad, s = grad_XTK[x, t, i], indices_XTK[x, t, i]
                keys_E, keys_grad_E = keys_XSE[x, s, start:stop], keys_grad_XSE[x, s, start:stop]
                for e in range(stop - start):
                    q_grad_E[e] += grad * keys_E[e]
                    keys_grad_E[e] += grad * q_E[e]
