"""The best keys of every query in plain torch operations: all scores in one piece, whose gradient is dense.

Letters: X heads and halves, T tokens, E dimension of a key, S keys, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.ranked_topk.eager import ranked_topk_eager


def half_topk_eager(q_XTE: Tensor, keys_XSE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.half_topk`."""
    scores_XTS = torch.bmm(q_XTE, keys_XSE.mT)
    indices_XTK = ranked_topk_eager(scores_XTS.detach(), k)
    return scores_XTS.gather(-1, indices_XTK), indices_XTK.int()
