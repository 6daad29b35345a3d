"""Top-k with a defined order of equal scores: what experts, candidates and preselections are chosen by.

Letters: `...` any leading shape, S scores, K kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.ranked_topk.eager import ranked_topk_eager
from pkm_lightning.ops.ranked_topk.limits import WIDENED, check_limits, default_backend
from pkm_lightning.ops.ranked_topk.operator import ranked_topk_kernels
from pkm_lightning.ops.ranked_topk.reference import ranked_topk_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(ranked_topk_kernels, backend="cpu"),
    "triton": functools.partial(ranked_topk_kernels, backend="triton"),
    "eager": ranked_topk_eager,
    "reference": ranked_topk_reference,
}

__all__ = ["ranked_topk"]


def ranked_topk(scores_XS: Float[Tensor, "*X S"], k: int, *, backend: str = "auto") -> Int[Tensor, "*X K"]:
    """Indices of the `k` largest scores, best first, equal scores by lower index (which `torch.topk` leaves open).

    NaN ranks above infinity, -0.0 equals 0.0. Every backend returns the same indices; they carry no gradient.

    Args:
        scores_XS: any floating dtype; float64 is left to torch on CUDA devices.
        k: 1 to S.
        backend: `auto`, `cpu` (numba), `triton` (k to 128), `eager` (torch's top-k and sort) or `reference` (sort).

    Returns:
        int64 indices.

    Raises:
        ValueError: `k` out of range, an unknown backend, or one that cannot run here or in this dtype.
    """
    if not 1 <= k <= scores_XS.shape[-1]:
        raise ValueError(f"ranked_topk: k={k} is out of range; allowed: 1 to {scores_XS.shape[-1]} (scores a row).")
    check_limits("ranked_topk", backend, scores_XS, k, WIDENED)
    default = default_backend(scores_XS, k, WIDENED)
    return choose_backend("ranked_topk", backend, default, _BACKENDS, scores_XS)(scores_XS, k)
