"""Rotations of pairs of values by angles per token: rotary position embedding.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.operators import is_transformed
from pkm_lightning.ops.rotary.eager import rotary_eager
from pkm_lightning.ops.rotary.operator import rotary_kernel
from pkm_lightning.ops.rotary.reference import rotary_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": rotary_kernel,
    "eager": rotary_eager,
    "reference": rotary_reference,
}

__all__ = ["rotary"]


def rotary(
    x_BTHC: Float[Tensor, "B T H C"],
    cos_ITF: Float[Tensor, "I T F"],
    sin_ITF: Float[Tensor, "I T F"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "B T H C"]:
    """Rotates the pairs `(x[f], x[f + F])` of every head by the angle f of their token.

    Differentiable in `x`. Every backend computes in the dtype of the angles, gives the same bits, and rounds once to
    the dtype of `x`.

    Args:
        x_BTHC: the values.
        cos_ITF, sin_ITF: cosines and sines of the angles, of one dtype, without gradients.
        backend: `auto`, `cpu` (numba; float32), `eager` (torch) or `reference` (a loop).

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend is unknown or cannot run here or in this dtype.
    """
    shape, angles = x_BTHC.shape, (*x_BTHC.shape[1:2], x_BTHC.shape[-1] // 2)
    if (
        x_BTHC.ndim != 4
        or shape[-1] % 2
        or cos_ITF.shape != sin_ITF.shape
        or cos_ITF.shape[1:] != angles
        or len(cos_ITF) not in (1, shape[0])
    ):
        raise ValueError(
            "rotary: needs x (B, T, H, C) with an even C, and angles (B or 1, T, C / 2), got "
            f"{tuple(shape)}, {tuple(cos_ITF.shape)} and {tuple(sin_ITF.shape)}."
        )
    # Compiled code fuses the operations itself.
    fits = x_BTHC.dtype is cos_ITF.dtype is sin_ITF.dtype is torch.float32
    has_kernel = fits and best_backend(x_BTHC) == "cpu" and not is_transformed()
    if backend == "cpu" and not fits:
        raise ValueError(f"rotary: backend='cpu' takes torch.float32, got {x_BTHC.dtype} and {cos_ITF.dtype}.")
    implementation = choose_backend("rotary", backend, "cpu" if has_kernel else "eager", _BACKENDS, x_BTHC)
    return implementation(x_BTHC, cos_ITF, sin_ITF)
