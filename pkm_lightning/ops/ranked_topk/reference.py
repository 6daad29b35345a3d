"""Ranked top-k as it is defined: sort the whole row, stably.

Letters: `...` any leading shape, S scores, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked_topk_reference(scores_XS: Tensor, k: int) -> Tensor:
    """See `pkm_lightning.ops.ranked_topk`; torch sorts NaN above infinity and -0.0 as 0.0."""
    return torch.sort(scores_XS, dim=-1, descending=True, stable=True).indices[..., :k]
