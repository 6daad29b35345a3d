"""count_reads on the CPU: one pass over the reads that updates the three counters (numba, one thread).

Letters: M = N + 1 counters, C reads per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.count_reads.reference import WEIGHT_LIMIT, WEIGHT_UNIT
from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import KERNEL

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
    """Counts with the numba kernel; the arguments are those of `pkm_lightning.ops.count_reads`."""
    if weights_TC.dtype is not torch.float64:
        weights_TC = weights_TC.float()
    # The kernel takes an array in any case: with None numba would compile it a second time.
    padding_T = torch.ones(0, dtype=torch.bool) if valid_T is None else valid_T
    tensors = (counts_M, weights_M, last_M, ids_TC.contiguous(), weights_TC.contiguous(), padding_T.contiguous())
    _count(*map(numpy_view, tensors), valid_T is not None, step)


# Not parallel: two threads could meet in one slot, and the pass is bound by memory.
@njit(**KERNEL)
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
            # In float64: the units of one read need up to 41 bits.
            slot, weight = ids_TC[t, c], abs(np.float64(weights_TC[t, c]))
            if slot < 0 or slot >= n_slots:
                continue
            counts_M[slot] += 1
            last_M[slot] = step
            if weight == weight:  # False for NaN, which counts as 0
                weights_M[slot] += np.int64(min(weight, WEIGHT_LIMIT) * _UNITS + 0.5)
