"""Product top-k by brute force: rank both halves, score every pair, sort all of them. Memory O(S * S) a row.

Letters: `...` any leading shape, S sub-keys a half, P = S * S pairs, K slots kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_topk_reference(scores1_XS: Tensor, scores2_XS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.product_topk`; stable sorts make both tie rules true by construction."""
    n_keys = scores1_XS.shape[-1]
    ranked1_XS, key1_XS = torch.sort(scores1_XS, dim=-1, descending=True, stable=True)
    ranked2_XS, key2_XS = torch.sort(scores2_XS, dim=-1, descending=True, stable=True)
    sums_XP = (ranked1_XS.unsqueeze(-1) + ranked2_XS.unsqueeze(-2)).flatten(-2)
    ids_XP = (key1_XS.unsqueeze(-1) * n_keys + key2_XS.unsqueeze(-2)).flatten(-2)
    best_XP, order_XP = torch.sort(sums_XP, dim=-1, descending=True, stable=True)
    return best_XP[..., :k], ids_XP.gather(-1, order_XP[..., :k]).int()
