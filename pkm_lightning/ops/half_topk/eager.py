"""half_topk in torch operations: all scores at once, with a dense gradient.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.ranked_topk.eager import ranked_topk_eager


def half_topk_eager(q_XTF: Tensor, keys_XSF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.half_topk`; holds X * T * S scores, and as many gradients of them, in memory."""
    scores_XTS = torch.bmm(q_XTF, keys_XSF.mT)
    indices_XTK = ranked_topk_eager(scores_XTS.detach(), k)
    return scores_XTS.gather(-1, indices_XTK), indices_XTK.int()
