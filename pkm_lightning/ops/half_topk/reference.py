"""The best keys of every query as they are defined: all scores, sorted; the gradient is autograd's.

Letters: X heads and halves, T tokens, E dimension of a key, S keys, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_topk_reference(q_XTE: Tensor, keys_XSE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.half_topk`."""
    scores_XTS = torch.einsum("xte,xse->xts", q_XTE, keys_XSE)
    values_XTS, indices_XTS = torch.sort(scores_XTS, dim=-1, descending=True, stable=True)
    return values_XTS[..., :k], indices_XTS[..., :k].int()
