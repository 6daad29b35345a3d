"""The best sub-keys of every query, found without holding the scores of all of them in memory.

Letters: `...` or X any leading shape (heads and halves), F dimension of a half key; K sub-keys kept per query.
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

#: How float32 scores may be multiplied on a GPU: in float32, or as three products of TF32 parts.
SCORE_PRECISIONS = ("ieee", "tf32x3")

_BACKENDS: dict[str, dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    precision: {
        # Only GPUs have TF32.
        "cpu": functools.partial(half_topk_kernels, backend="cpu", precision="ieee"),
        "triton": functools.partial(half_topk_kernels, backend="triton", precision=precision),
        "eager": half_topk_eager,
        "reference": half_topk_reference,
    }
    for precision in SCORE_PRECISIONS
}

__all__ = ["SCORE_PRECISIONS", "half_topk"]


def half_topk(
    q_XTF: Float[Tensor, "*X T F"],
    keys_XSF: Float[Tensor, "*X S F"],
    k: int,
    *,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> tuple[Float[Tensor, "*X T K"], Int32[Tensor, "*X T K"]]:
    """Finds the `k` largest `<q[x, t], keys[x, s]>` of every query, best first, equal scores by lower key index.

    Together with `product_combine` it is the retrieval of a product-key memory (Lample et al. 2019, section 3.1,
    eq. 2-5). NaN ranks above infinity. Scores are computed in the queries' dtype; callers must switch autocast off.

    Args:
        q_XTF: queries of any leading shape, float32 or float64.
        keys_XSF: sub-keys of the same leading shape and dtype.
        k: sub-keys to keep per query, 1 to S.
        precision: how the GPU kernel multiplies: `ieee` in float32, `tf32x3` as three products of TF32 parts where the
            GPU has TF32, which is as exact as the sums of float32 and faster. All else is IEEE either way.
        backend: `auto`, `cpu` (numba), `triton` (float32), `eager` (all scores at once, any device) or `reference`.

    Returns:
        The scores, differentiable in queries and keys, and the int32 indices of the keys.

    Raises:
        ValueError: shapes or dtypes do not fit, `k` is out of range, the precision is unknown, or the backend is
            unknown or cannot run here or in this dtype.
    """
    fit = (q_XTF.shape[:-2], q_XTF.shape[-1:]) == (keys_XSF.shape[:-2], keys_XSF.shape[-1:])
    if min(q_XTF.ndim, keys_XSF.ndim) < 2 or not fit:
        raise ValueError(
            "half_topk: needs queries (..., T, F) and keys (..., S, F), got "
            f"{tuple(q_XTF.shape)} and {tuple(keys_XSF.shape)}."
        )
    if q_XTF.dtype is not keys_XSF.dtype or q_XTF.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"half_topk: queries are {q_XTF.dtype} and keys {keys_XSF.dtype}; both need torch.float32 or torch.float64."
        )
    if not 1 <= k <= keys_XSF.shape[-2]:
        raise ValueError(f"half_topk: k={k} is out of range; allowed: 1 to {keys_XSF.shape[-2]} (keys).")
    check_precision("half_topk", precision)
    check_limits("half_topk", backend, q_XTF, k, EXACT)
    default = default_backend(q_XTF, k, EXACT)
    implementation = choose_backend("half_topk", backend, default, _BACKENDS[precision], q_XTF)
    # Backends take one leading dimension: an entry is one half of one head.
    (tokens, dim), n_keys = q_XTF.shape[-2:], keys_XSF.shape[-2]
    entries = q_XTF.shape[:-2].numel()
    values_XTK, indices_XTK = implementation(
        q_XTF.reshape(entries, tokens, dim), keys_XSF.reshape(entries, n_keys, dim), k
    )
    shape = (*q_XTF.shape[:-1], k)
    return values_XTK.reshape(shape), indices_XTK.reshape(shape)


def check_precision(op: str, precision: str) -> None:
    """Checks that `precision` is one of `SCORE_PRECISIONS`.

    Raises:
        ValueError: it is not.
    """
    if precision not in SCORE_PRECISIONS:
        raise ValueError(f"{op}: precision={precision!r}; allowed: {', '.join(SCORE_PRECISIONS)}.")
