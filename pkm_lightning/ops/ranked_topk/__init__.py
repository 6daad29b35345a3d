"""Top-k with a defined order of equal scores, for the choice of experts, candidates and sub-keys.

Letters: `...` or X any leading shape, L scores per row; K indices kept.
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
    **{name: functools.partial(ranked_topk_kernels, backend=name) for name in ("cpu", "triton")},
    "eager": ranked_topk_eager,
    "reference": ranked_topk_reference,
}

__all__ = ["ranked_topk"]


def ranked_topk(scores_XL: Float[Tensor, "*X L"], k: int, *, backend: str = "auto") -> Int[Tensor, "*X K"]:
    """Returns the indices of the `k` largest scores, best first, equal scores by lower index.

    `torch.topk` leaves the order of equal scores open, and which of them are kept. NaN ranks above infinity, -0.0
    equals 0.0. Every backend returns the same indices; they have no gradient.

    Args:
        scores_XL: scores of any floating dtype; `auto` leaves float64 on CUDA devices to torch.
        k: indices to keep per row, 1 to L.
        backend: `auto`, `cpu` (numba), `triton` (k up to 128), `eager` (torch's top-k and sort) or `reference` (sort).

    Returns:
        int64 indices.

    Raises:
        ValueError: `k` is out of range, or the backend is unknown or cannot run here or in this dtype.
    """
    if not 1 <= k <= scores_XL.shape[-1]:
        raise ValueError(f"ranked_topk: k={k} is out of range; allowed: 1 to {scores_XL.shape[-1]} (scores per row).")
    check_limits("ranked_topk", backend, scores_XL, k, WIDENED)
    default = default_backend(scores_XL, k, WIDENED)
    return choose_backend("ranked_topk", backend, default, _BACKENDS, scores_XL)(scores_XL, k)
