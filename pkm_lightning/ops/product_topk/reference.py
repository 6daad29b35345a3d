"""Naive product_combine: score every pair and sort all of them.

Letters: X any leading shape, J sub-keys kept per half, P = J * J pairs; K slots kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product_combine_reference(
    values1_XJ: Tensor, indices1_XJ: Tensor, values2_XJ: Tensor, indices2_XJ: Tensor, n_keys: int, k: int
) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.product_combine` by a stable sort, which keeps ties in the order of their ranks."""
    first_XJ1, second_X1J = values1_XJ.unsqueeze(-1), values2_XJ.unsqueeze(-2)
    sums_XJJ = first_XJ1 + second_X1J
    opposite_XJJ = (first_XJ1 == math.inf) & (second_X1J == -math.inf)
    opposite_XJJ |= (first_XJ1 == -math.inf) & (second_X1J == math.inf)
    # A sum of -inf is a constant without gradient.
    sums_XP = torch.where(opposite_XJJ | (sums_XJJ == -math.inf), -math.inf, sums_XJJ).flatten(-2)
    ids_XP = (indices1_XJ.unsqueeze(-1) * n_keys + indices2_XJ.unsqueeze(-2)).flatten(-2)
    best_XP, order_XP = torch.sort(sums_XP, dim=-1, descending=True, stable=True)
    return best_XP[..., :k], ids_XP.gather(-1, order_XP[..., :k]).int()
