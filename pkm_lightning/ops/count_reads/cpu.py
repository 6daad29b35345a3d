"""The three counters in one pass over the reads (numba), one thread: two must not meet in one slot.

Letters: N slots, M = N + 1 counters, T tokens, C reads a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.count_reads.reference import WEIGHT_LIMIT, WEIGHT_UNIT

_UNITS = 1 / WEIGHT_UNIT


def count_reads_cpu(
    counts_M: Tensor,
    weights_M: Tensor,
    last_M: Tensor,
    ids_TC: Tensor,
    weights_TC: Tensor,
    valid_T: Tensor | None,
    step: int,
) -> None:
    """See `pkm_lightning.ops.count_reads`."""
    if weights_TC.dtype is not torch.float64:
        weights_TC = weights_TC.float()
    valid_T = torch.ones(1, dtype=torch.bool) if valid_T is None else valid_T
    tensors = (counts_M, weights_M, last_M, ids_TC.contiguous(), weights_TC.contiguous(), valid_T.contiguous())
    # A tensor whose memory FSDP2 takes back after use must not be seen by `.numpy()`, which forbids that for good.
    _count(*(np.from_dlpack(tensor.detach()) for tensor in tensors), len(valid_T) == len(ids_TC), step)


@njit(nogil=True, cache=True)
def _count(
    counts_M: Any,
    weights_M: Any,
    last_M: Any,
    ids_TC: Any,
    weights_TC: Any,
    valid_T: Any,
    has_padding: bool,
    step: int,
) -> None:
    n_slots = len(counts_M) - 1
    for t in range(ids_TC.shape[0]):
        if has_padding and not valid_T[t]:
            continue
        for c in range(ids_TC.shape[1]):
            slot, weight = ids_TC[t, c], abs(np.float64(weights_TC[t, c]))
            if slot < 0 or slot >= n_slots:
                continue
            counts_M[slot] += 1
            last_M[slot] = step
            if weight == weight:  # a NaN is nothing
                weights_M[slot] += np.int64(min(weight, WEIGHT_LIMIT) * _UNITS + 0.5)
