"""Gradient of product_combine on the CPU (numba); the forward is in `ranked_topk/cpu.py` with the ranking kernels.

Letters: R rows, J sub-keys kept per half, C candidate pairs; K slots kept.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import rank_sums as combine_rows

__all__ = ["add_to_halves", "combine_rows"]


def add_to_halves(*tensors: Tensor) -> None:
    """Adds to the last two of (grad, sums, candidates, rank 1, rank 2, grad of half 1, grad of half 2).

    All tensors are contiguous.
    """
    use_torch_threads()
    _add_to_halves(*map(numpy_view, tensors))


@njit(nogil=True, parallel=True, cache=True)
def _add_to_halves(
    grad_RK: Any, sums_RK: Any, chosen_RK: Any, rank1_C: Any, rank2_C: Any, grad1_RJ: Any, grad2_RJ: Any
) -> None:
    # A thread owns whole rows, so that the slots of a row are added in one order.
    for r in prange(grad_RK.shape[0]):
        for i in range(grad_RK.shape[1]):
            # A sum of -inf is a constant: it may have been set, for (+inf) + (-inf).
            if sums_RK[r, i] != -math.inf:
                c = chosen_RK[r, i]
                grad1_RJ[r, rank1_C[c]] += grad_RK[r, i]
                grad2_RJ[r, rank2_C[c]] += grad_RK[r, i]
