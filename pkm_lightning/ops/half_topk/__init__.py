"""The best keys of every query, without the scores of all of them in memory.

Letters: `...` any leading shape (heads and halves), T tokens, E dimension of a key, S keys, K kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.half_topk.eager import half_topk_eager
from pkm_lightning.ops.half_topk.operator import half_topk_kernels
from pkm_lightning.ops.half_topk.reference import half_topk_reference
from pkm_lightning.ops.ranked_topk.limits import EXACT, check_limits, default_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int32
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": functools.partial(half_topk_kernels, backend="cpu"),
    "triton": functools.partial(half_topk_kernels, backend="triton"),
    "eager": half_topk_eager,
    "reference": half_topk_reference,
}

__all__ = ["half_topk"]


def half_topk(
    q_XTE: Float[Tensor, "*X T E"], keys_XSE: Float[Tensor, "*X S E"], k: int, *, backend: str = "auto"
) -> tuple[Float[Tensor, "*X T K"], Int32[Tensor, "*X T K"]]:
    """The `k` largest `<q[x, t], keys[x, s]>` of every query, best first, equal scores by lower key.

    With `product_combine` it is the retrieval of a product-key memory (Lample et al. 2019, section 3.1, eq. 2-5).
    NaN ranks above infinity. Under autocast the caller switches it off: scores are computed in the queries' dtype.

    Args:
        q_XTE: queries of any leading shape, float32 or float64; scores are IEEE, never TF32.
        keys_XSE: keys of the same leading shape and dtype.
        k: keys to keep, 1 to S.
        backend: `auto`, `cpu` (numba), `triton` (float32), `eager` (all scores at once, any device) or `reference`.

    Returns:
        The scores, differentiable in queries and keys, and the keys' int32 indices.

    Raises:
        ValueError: shapes or dtypes that do not fit, `k` out of range, an unknown backend, or one that cannot run here
            or in this dtype.
    """
    fit = (q_XTE.shape[:-2], q_XTE.shape[-1:]) == (keys_XSE.shape[:-2], keys_XSE.shape[-1:])
    if min(q_XTE.ndim, keys_XSE.ndim) < 2 or not fit:
        raise ValueError(
            "half_topk: needs queries (..., T, E) and keys (..., S, E), got "
            f"{tuple(q_XTE.shape)} and {tuple(keys_XSE.shape)}."
        )
    if q_XTE.dtype is not keys_XSE.dtype or q_XTE.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"half_topk: queries are {q_XTE.dtype} and keys {keys_XSE.dtype}; both need torch.float32 or torch.float64."
        )
    if not 1 <= k <= keys_XSE.shape[-2]:
        raise ValueError(f"half_topk: k={k} is out of range; allowed: 1 to {keys_XSE.shape[-2]} (keys).")
    check_limits("half_topk", backend, q_XTE, k, EXACT)
    default = default_backend(q_XTE, k, EXACT)
    run = choose_backend("half_topk", backend, default, _BACKENDS, q_XTE)
    (tokens, dim), n_keys = q_XTE.shape[-2:], keys_XSE.shape[-2]
    entries = q_XTE.shape[:-2].numel()
    values_YTK, indices_YTK = run(q_XTE.reshape(entries, tokens, dim), keys_XSE.reshape(entries, n_keys, dim), k)
    shape = (*q_XTE.shape[:-1], k)
    return values_YTK.reshape(shape), indices_YTK.reshape(shape)
