"""Ranked top-k through torch's own top-k and sort.

Letters: `...` any leading shape, R rows, S scores, K kept, J one more than kept, U rows that a tie leaves unclear.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked_topk_eager(scores_XS: Tensor, k: int) -> Tensor:
    """See `pkm_lightning.ops.ranked_topk`."""
    # Where a branch on data is dear (a GPU, a traced graph), the stable sort is taken at once.
    if scores_XS.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(scores_XS, dim=-1, descending=True, stable=True).indices[..., :k]
    # One more than k: a tie across the k-th place also leaves open which of the equals is in.
    rows_RS = scores_XS.reshape(-1, scores_XS.shape[-1])
    values_RJ, indices_RJ = torch.topk(rows_RS, min(k + 1, rows_RS.shape[-1]), dim=-1)
    indices_RK = indices_RJ[:, :k]
    unclear_R = ~(values_RJ[:, :-1] > values_RJ[:, 1:]).all(-1)
    if bool(unclear_R.any()):
        exact_US = torch.sort(rows_RS[unclear_R], dim=-1, descending=True, stable=True).indices
        indices_RK = indices_RK.masked_scatter(unclear_R[:, None], exact_US[:, :k].contiguous())
    return indices_RK.reshape(*scores_XS.shape[:-1], k)
