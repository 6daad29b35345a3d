"""Exact top-k over the product of two sub-key sets, from the scores of the halves or from their ranked best.

Letters: `...` any leading shape, S sub-keys a half (N = S * S slots), J kept a half, K slots kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.product_topk.eager import product_combine_eager
from pkm_lightning.ops.product_topk.operator import product_combine_kernels
from pkm_lightning.ops.product_topk.reference import product_combine_reference
from pkm_lightning.ops.ranked_topk import ranked_topk
from pkm_lightning.ops.ranked_topk.limits import EXACT, check_limits, default_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int, Int32
    from torch import Tensor

_COMBINE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": functools.partial(product_combine_kernels, backend="cpu"),
    "triton": functools.partial(product_combine_kernels, backend="triton"),
    "eager": product_combine_eager,
    "reference": product_combine_reference,
}

__all__ = ["product_topk", "product_combine"]


def product_topk(
    scores1_XS: Float[Tensor, "*X S"], scores2_XS: Float[Tensor, "*X S"], k: int, *, backend: str = "auto"
) -> tuple[Float[Tensor, "*X K"], Int32[Tensor, "*X K"]]:
    """The `k` slots (i, j) with the largest `scores1[i] + scores2[j]` (Lample et al. 2019, section 3.1, eq. 4-5).

    Equal half scores rank by lower sub-key index, equal sums by (rank in half 1, rank in half 2), so that every
    backend returns the same slots for the same half scores. NaN ranks above infinity; README.md has the exact rules.

    Args:
        scores1_XS, scores2_XS: scores of the first and of the second half key, same shape and dtype.
        k: slots to keep, 1 to S * S.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (torch operations, any device) or `reference` (scores all
            S * S slots).

    Returns:
        The sums, best first and differentiable in both scores, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: shapes or dtypes that differ, `k` out of range, more than 2**31 - 1 slots, an unknown backend, or
            one that cannot run here or in this dtype.
    """
    if scores1_XS.shape != scores2_XS.shape or scores1_XS.dtype is not scores2_XS.dtype:
        raise ValueError(
            "product_topk: both halves need one shape and dtype, got "
            f"{tuple(scores1_XS.shape)} of {scores1_XS.dtype} and {tuple(scores2_XS.shape)} of {scores2_XS.dtype}."
        )
    n_keys = scores1_XS.shape[-1]
    _check_slots("product_topk", n_keys, k)
    combine = _choose("product_topk", backend, scores1_XS, k)
    # The reference prunes nothing, and so depends on no proof.
    per_half = n_keys if backend == "reference" else min(k, n_keys)
    key1_XJ, key2_XJ = (ranked_topk(half.detach(), per_half, backend=backend) for half in (scores1_XS, scores2_XS))
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
    """`product_topk` from halves that are ranked already, as `half_topk` returns them.

    Args:
        values1_XJ, values2_XJ: the best scores of each half, best first (not checked), of one dtype.
        indices1_XJ, indices2_XJ: their sub-keys, int32 or int64.
        n_keys: sub-keys a half S.
        k: slots to keep, 1 to S * S; J must be min(k, S) at least.
        backend: as in `product_topk`; `reference` scores all J * J pairs.

    Returns:
        The sums, best first and differentiable in both values, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: as in `product_topk`, or fewer than min(k, S) kept a half.
    """
    shapes = [tuple(half.shape) for half in (values1_XJ, indices1_XJ, values2_XJ, indices2_XJ)]
    if len(set(shapes)) > 1 or values1_XJ.dtype is not values2_XJ.dtype:
        raise ValueError(
            f"product_combine: values and indices need one shape and both values one dtype, got shapes {shapes} and "
            f"{values1_XJ.dtype}, {values2_XJ.dtype}."
        )
    _check_slots("product_combine", n_keys, k)
    per_half = min(k, n_keys)
    if shapes[0][-1] < per_half:
        raise ValueError(f"product_combine: {shapes[0][-1]} kept a half; k={k} of {n_keys} sub-keys needs {per_half}.")
    combine = _choose("product_combine", backend, values1_XJ, k)
    halves = (half[..., :per_half] for half in (values1_XJ, indices1_XJ, values2_XJ, indices2_XJ))
    return combine(*halves, n_keys, k)


def _check_slots(op: str, n_keys: int, k: int) -> None:
    n_slots = n_keys**2
    if not 1 <= k <= n_slots:
        raise ValueError(f"{op}: k={k} is out of range; allowed: 1 to {n_slots} (sub-keys squared).")
    if n_slots > 2**31 - 1:
        raise ValueError(f"{op}: {n_slots} slots do not fit int32 ids; at most 46,340 sub-keys a half.")


def _choose(op: str, backend: str, values_XJ: Tensor, k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    check_limits(op, backend, values_XJ, k, EXACT)
    return choose_backend(op, backend, default_backend(values_XJ, k, EXACT), _COMBINE, values_XJ)
