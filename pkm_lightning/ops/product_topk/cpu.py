"""The combination of two ranked halves on the CPU (numba); its forward stands beside the other ranking kernels.

Letters: R rows, J kept a half, K slots kept.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, prange
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.ranked_topk.cpu import rank_sums as combine_rows

__all__ = ["add_to_halves", "combine_rows"]


def add_to_halves(*tensors: Tensor) -> None:
    """Adds to the last two of (grad, sums, candidates, rank 1, rank 2, grad of half 1, of half 2), all contiguous."""
    use_torch_threads()
    _add_to_halves(*(tensor.detach().numpy() for tensor in tensors))


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
