"""Exact top-k over the product of two sub-key sets, from the scores of the halves.

Letters: `...` any leading shape, S sub-keys a half (N = S * S slots), K slots kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.product_topk.eager import product_topk_eager
from pkm_lightning.ops.product_topk.reference import product_topk_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int32
    from torch import Tensor

_BACKENDS = {"eager": product_topk_eager, "reference": product_topk_reference}

__all__ = ["product_topk"]


def product_topk(
    scores1_XS: Float[Tensor, "*X S"], scores2_XS: Float[Tensor, "*X S"], k: int, *, backend: str = "auto"
) -> tuple[Float[Tensor, "*X K"], Int32[Tensor, "*X K"]]:
    """The `k` slots (i, j) with the largest `scores1[i] + scores2[j]` (Lample et al. 2019, section 3.1, eq. 4-5).

    Equal half scores rank by lower sub-key index, equal sums by (rank in half 1, rank in half 2), so that every
    backend returns the same slots for the same half scores.

    Args:
        scores1_XS, scores2_XS: scores of the first and of the second half key, same shape and dtype.
        k: slots to keep, 1 to S * S.
        backend: `auto`, `eager` (torch operations, any device) or `reference` (scores all S * S slots).

    Returns:
        The sums, best first and differentiable in both scores, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: shapes that differ, `k` out of range, more than 2**31 - 1 slots, or an unknown backend.
    """
    if scores1_XS.shape != scores2_XS.shape:
        raise ValueError(
            f"product_topk: both halves need one shape, got {tuple(scores1_XS.shape)} and {tuple(scores2_XS.shape)}."
        )
    n_slots = scores1_XS.shape[-1] ** 2
    if not 1 <= k <= n_slots:
        raise ValueError(f"product_topk: k={k} is out of range; allowed: 1 to {n_slots} (sub-keys squared).")
    if n_slots > 2**31 - 1:
        raise ValueError(f"product_topk: {n_slots} slots do not fit int32 ids; at most 46,340 sub-keys a half.")
    return choose_backend("product_topk", backend, "eager", _BACKENDS, scores1_XS)(scores1_XS, scores2_XS, k)
