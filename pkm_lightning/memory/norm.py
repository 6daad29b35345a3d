"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) through the fastest kernel of the device.

Letters: X any leading shape, C values that are normalised together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.ops.backends import HAS_NUMBA
from pkm_lightning.ops.operators import is_transformed
from pkm_lightning.ops.rms_norm.operator import norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm of the last dimension, which on a CPU takes a kernel of this package in fp32."""

    def forward(self, x_XC: Float[Tensor, "*X C"]) -> Float[Tensor, "*X C"]:
        """Returns `x / sqrt(mean(x**2) + eps) * weight`."""
        if not self.elementwise_affine:
            return super().forward(x_XC)
        return normalised(x_XC, self.weight, self.eps)


def normalised(x_XC: Float[Tensor, "*X C"], gain_C: Float[Tensor, " C"], eps: float | None) -> Float[Tensor, "*X C"]:
    """Computes what `torch.nn.functional.rms_norm` does; an `eps` of None is that of the dtype."""
    # On CPUs torch 2.13 composes the norm and its gradient of a dozen passes over the values; on GPUs it has a kernel.
    # Compiled code is fused anyway. On the meta device the kernel stands for both: neither keeps more than its input.
    has_kernel = HAS_NUMBA and (x_XC.is_cpu or x_XC.is_meta) and x_XC.dtype is gain_C.dtype is torch.float32
    # torch has the words for a width that does not fit.
    if not has_kernel or x_XC.shape[-1:] != gain_C.shape or is_transformed():
        return functional.rms_norm(x_XC, gain_C.shape, gain_C, eps)
    # Past the checks of `ops.rms_norm`, which small layers call several times.
    return norm(x_XC, gain_C, 1, torch.finfo(x_XC.dtype).eps if eps is None else eps, backend="cpu")
