"""Naive rms_norm: one part after the other, in fp64.

Letters: G equal parts of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x_TD: Tensor, gain_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm`."""
    parts = [part / torch.sqrt((part**2).mean(-1, keepdim=True) + eps) for part in x_TD.double().chunk(groups, -1)]
    return (torch.cat(parts, -1) * gain_D).to(x_TD.dtype)


def dot(x_TD: Tensor, y_TD: Tensor, gain_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm_dot`."""
    one_D = torch.ones_like(gain_D)
    product_TD = norm(x_TD.double(), gain_D, groups, eps) * norm(y_TD.double(), one_D, groups, eps)
    dots_TG = torch.stack([part.sum(-1) for part in product_TD.chunk(groups, -1)], -1)
    return dots_TG.to(torch.promote_types(x_TD.dtype, torch.float32))
