"""rms_norm in torch operations.

Letters: G equal parts of a vector, C = D / G values of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x_TD: Tensor, gain_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm`."""
    x_TGC = _parts(x_TD, groups)
    normed_TD = (x_TGC * _inverse_roots(x_TGC, eps)).flatten(-2)
    return (normed_TD * gain_D.to(normed_TD.dtype)).type_as(x_TD)


def dot(x_TD: Tensor, y_TD: Tensor, gain_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm_dot`: a part is divided by its root after the sum, as one number."""
    x_TGC, y_TGC = _parts(x_TD, groups), _parts(y_TD, groups)
    dots_TG1 = (x_TGC * y_TGC * _parts(gain_D, groups)).sum(-1, keepdim=True)
    return (dots_TG1 * _inverse_roots(x_TGC, eps) * _inverse_roots(y_TGC, eps)).squeeze(-1)


def _parts(x_TD: Tensor, groups: int) -> Tensor:
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)).unflatten(-1, (groups, -1))


def _inverse_roots(x_TGC: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x_TGC.square().mean(-1, keepdim=True) + eps)
