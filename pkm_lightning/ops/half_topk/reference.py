"""Naive half_topk: all scores, sorted, with the gradient by autograd.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_topk_reference(q_XTF: Tensor, keys_XSF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.half_topk` by a stable sort of all scores."""
    scores_XTS = torch.einsum("xtf,xsf->xts", q_XTF, keys_XSF)
    values_XTS, indices_XTS = torch.sort(scores_XTS, dim=-1, descending=True, stable=True)
    return values_XTS[..., :k], indices_XTS[..., :k].int()
