"""Naive ranked_topk: a stable sort of the whole row.

Letters: X any leading shape, L scores per row; K indices kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked_topk_reference(scores_XL: Tensor, k: int) -> Tensor:
    """Computes `pkm_lightning.ops.ranked_topk`; torch sorts NaN above infinity and -0.0 as 0.0."""
    return torch.sort(scores_XL, dim=-1, descending=True, stable=True).indices[..., :k]
