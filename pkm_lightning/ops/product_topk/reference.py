"""The combination of two ranked halves by brute force: score every pair and sort all of them.

Letters: `...` any leading shape, J kept a half, P = J * J pairs, K slots kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product_combine_reference(
    values1_XJ: Tensor, indices1_XJ: Tensor, values2_XJ: Tensor, indices2_XJ: Tensor, n_keys: int, k: int
) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.product_topk.product_combine`; the stable sort makes its order of ties true."""
    first_XJ1, second_X1J = values1_XJ.unsqueeze(-1), values2_XJ.unsqueeze(-2)
    sums_XJJ = first_XJ1 + second_X1J
    opposite_XJJ = (first_XJ1 == math.inf) & (second_X1J == -math.inf)
    opposite_XJJ |= (first_XJ1 == -math.inf) & (second_X1J == math.inf)
    sums_XP = torch.where(opposite_XJJ | (sums_XJJ == -math.inf), -math.inf, sums_XJJ).flatten(-2)
    ids_XP = (indices1_XJ.unsqueeze(-1) * n_keys + indices2_XJ.unsqueeze(-2)).flatten(-2)
    best_XP, order_XP = torch.sort(sums_XP, dim=-1, descending=True, stable=True)
    return best_XP[..., :k], ids_XP.gather(-1, order_XP[..., :k]).int()
