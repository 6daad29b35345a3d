"""Retrieval in a product-key memory: the best slots of every query, from half queries and sub-keys.

Letters: Y sets of sub-keys: H, or 1 that all heads share; F dimension of a half key; 2 is the two halves.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.half_topk import SCORE_PRECISIONS, check_precision
from pkm_lightning.ops.product_search.composed import search_composed
from pkm_lightning.ops.product_search.operator import search_kernels
from pkm_lightning.ops.product_topk.limits import check_slots
from pkm_lightning.ops.ranked_topk.limits import EXACT, check_limits, default_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int32
    from torch import Tensor

_BACKENDS: dict[str, dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    precision: {
        "cpu": search_kernels,
        **{
            name: functools.partial(search_composed, precision=precision, backend=name)
            for name in ("triton", "eager", "reference")
        },
    }
    for precision in SCORE_PRECISIONS
}

__all__ = ["product_search"]


def product_search(
    q_TH2F: Float[Tensor, "T H 2 F"],
    keys_Y2SF: Float[Tensor, "Y 2 S F"],
    k: int,
    *,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> tuple[Float[Tensor, "T H K"], Int32[Tensor, "T H K"]]:
    """Finds the `k` slots (i, j) of every head with the largest `<q[0], keys[0, i]> + <q[1], keys[1, j]>`.

    It is `product_combine` of the `half_topk` of both halves (Lample et al. 2019, section 3.1), whose rules for ties,
    NaN and infinities hold. Scores are computed in the queries' dtype; callers must switch autocast off.

    Args:
        q_TH2F: half queries, float32 or float64.
        keys_Y2SF: sub-keys of the same dtype, a set per head or one for all.
        k: slots per head, 1 to S * S.
        precision: how the GPU kernel multiplies, `ieee` or `tf32x3`, see `half_topk`.
        backend: `auto`, `cpu` (numba), or those of `half_topk`: `triton`, `eager`, `reference`.

    Returns:
        The scores, best first and differentiable in queries and keys, and the slot ids `i * S + j` as int32.

    Raises:
        ValueError: shapes or dtypes do not fit, `k` is out of range, S is above `MAX_SUB_KEYS`, the precision is
            unknown, or the backend is unknown or cannot run here or in this dtype.
    """
    fit = q_TH2F.ndim == keys_Y2SF.ndim == 4 and (q_TH2F.shape[2], keys_Y2SF.shape[1]) == (2, 2)
    fit = fit and q_TH2F.shape[3] == keys_Y2SF.shape[3] and keys_Y2SF.shape[0] in (1, q_TH2F.shape[1])
    if not fit:
        raise ValueError(
            "product_search: needs queries (T, H, 2, F) and keys (H or 1, 2, S, F), got "
            f"{tuple(q_TH2F.shape)} and {tuple(keys_Y2SF.shape)}."
        )
    if q_TH2F.dtype is not keys_Y2SF.dtype or q_TH2F.dtype not in EXACT["cpu"]:
        raise ValueError(
            f"product_search: queries are {q_TH2F.dtype} and keys {keys_Y2SF.dtype}; both need torch.float32 or "
            "torch.float64."
        )
    check_slots("product_search", keys_Y2SF.shape[2], k)
    check_precision("product_search", precision)
    check_limits("product_search", backend, q_TH2F, k, EXACT)
    default = default_backend(q_TH2F, k, EXACT)
    return choose_backend("product_search", backend, default, _BACKENDS[precision], q_TH2F)(q_TH2F, keys_Y2SF, k)
