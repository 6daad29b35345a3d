"""Exact top-k over the product of two sets of sub-keys, from the scores of both halves or from their ranked best.

Letters: `...` or X any leading shape, J sub-keys kept per half; K slots kept, of the N = S * S slots.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.product_topk.eager import product_combine_eager
from pkm_lightning.ops.product_topk.limits import MAX_SUB_KEYS, check_slots
from pkm_lightning.ops.product_topk.operator import product_combine_kernels
from pkm_lightning.ops.product_topk.reference import product_combine_reference
from pkm_lightning.ops.ranked_topk import ranked_topk
from pkm_lightning.ops.ranked_topk.limits import EXACT, check_limits, default_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int, Int32
    from torch import Tensor

_COMBINE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    **{name: functools.partial(product_combine_kernels, backend=name) for name in ("cpu", "triton")},
    "eager": product_combine_eager,
    "reference": product_combine_reference,
}

__all__ = ["MAX_SUB_KEYS", "product_topk", "product_combine"]


def product_topk(
    scores1_XS: Float[Tensor, "*X S"], scores2_XS: Float[Tensor, "*X S"], k: int, *, backend: str = "auto"
) -> tuple[Float[Tensor, "*X K"], Int32[Tensor, "*X K"]]:
    """Finds the `k` slots (i, j) with the largest `scores1[i] + scores2[j]` (Lample et al. 2019, section 3.1, eq. 4-5).

    Equal half scores rank by lower sub-key index, equal sums by (rank in half 1, rank in half 2), so that every
    backend returns the same slots for the same half scores. NaN ranks above infinity; README.md has the exact rules.

    Args:
        scores1_XS, scores2_XS: scores of the sub-keys of the first and second half, of the same shape and dtype.
        k: slots to keep, 1 to S * S.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (torch operations, any device) or `reference` (scores all
            S * S slots).

    Returns:
        The sums, best first and differentiable in both scores, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: shapes or dtypes differ, `k` is out of range, S is above `MAX_SUB_KEYS`, or the backend is unknown
            or cannot run here or in this dtype.
    """
    if scores1_XS.shape != scores2_XS.shape or scores1_XS.dtype is not scores2_XS.dtype:
        raise ValueError(
            "product_topk: both halves need one shape and dtype, got "
            f"{tuple(scores1_XS.shape)} of {scores1_XS.dtype} and {tuple(scores2_XS.shape)} of {scores2_XS.dtype}."
        )
    n_keys = scores1_XS.shape[-1]
    check_slots("product_topk", n_keys, k)
    combine = _choose("product_topk", backend, scores1_XS, k)
    # The reference drops no sub-key, so that it does not depend on the proof that the top-k of each half suffices.
    per_half = n_keys if backend == "reference" else min(k, n_keys)
    key1_XJ, key2_XJ = (ranked_topk(half.detach(), per_half, backend=backend) for half in (scores1_XS, scores2_XS))
    # The ranking has no gradient; gathering by its indices has the one that is wanted.
    return combine(scores1_XS.gather(-1, key1_XJ), key1_XJ, scores2_XS.gather(-1, key2_XJ), key2_XJ, n_keys, k)


def product_combine(
    values1_XJ: Float[Tensor, "*X J"],
    indices1_XJ: Int[Tensor, "*X J"],
    values2_XJ: Float[Tensor, "*X J"],
    indices2_XJ: Int[Tensor, "*X J"],
    n_keys: int,
    k: int,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*X K"], Int32[Tensor, "*X K"]]:
    """Computes `product_topk` from halves that are ranked already, as `half_topk` returns them.

    Args:
        values1_XJ, values2_XJ: the best scores of each half, best first (not checked), of one dtype.
        indices1_XJ, indices2_XJ: the indices of their sub-keys, int32 or int64.
        n_keys: number S of sub-keys per half.
        k: slots to keep, 1 to S * S; J must be at least min(k, S).
        backend: as in `product_topk`; `reference` scores all J * J pairs.

    Returns:
        The sums, best first and differentiable in both values, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: as in `product_topk`, or if J is below min(k, S).
    """
    shapes = [tuple(half.shape) for half in (values1_XJ, indices1_XJ, values2_XJ, indices2_XJ)]
    # Compared and not put into a set: torch.compile would take sizes that are hashed for constants.
    if any(shape != shapes[0] for shape in shapes) or values1_XJ.dtype is not values2_XJ.dtype:
        raise ValueError(
            f"product_combine: values and indices need one shape and both values one dtype, got shapes {shapes} and "
            f"{values1_XJ.dtype}, {values2_XJ.dtype}."
        )
    check_slots("product_combine", n_keys, k)
    per_half = min(k, n_keys)
    if shapes[0][-1] < per_half:
        raise ValueError(
            f"product_combine: each half has {shapes[0][-1]} sub-keys; k={k} of {n_keys} sub-keys needs {per_half}."
        )
    combine = _choose("product_combine", backend, values1_XJ, k)
    halves = (half[..., :per_half] for half in (values1_XJ, indices1_XJ, values2_XJ, indices2_XJ))
    return combine(*halves, n_keys, k)


def _choose(op: str, backend: str, values_XJ: Tensor, k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    check_limits(op, backend, values_XJ, k, EXACT)
    return choose_backend(op, backend, default_backend(values_XJ, k, EXACT), _COMBINE, values_XJ)
