"""ranked_topk by torch's own top-k and sort.

Letters: X any leading shape, R rows, L scores per row; K indices kept, J = K + 1, U rows in which ties leave the order
open.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked_topk_eager(scores_XL: Tensor, k: int) -> Tensor:
    """Computes `pkm_lightning.ops.ranked_topk` by a top-k, and by a stable sort of the rows that have ties."""
    # The stable sort of everything where a branch on data is expensive (the host waits for a GPU) or breaks a graph.
    if scores_XL.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(scores_XL, dim=-1, descending=True, stable=True).indices[..., :k]
    rows_RL = scores_XL.reshape(-1, scores_XL.shape[-1])
    # One more than k: a tie across the k-th place leaves open which of the equal scores is kept.
    values_RJ, indices_RJ = torch.topk(rows_RL, min(k + 1, rows_RL.shape[-1]), dim=-1)
    indices_RK = indices_RJ[:, :k]
    # Not `<=`: NaN compares false, so that rows with NaN are sorted too.
    has_ties_R = ~(values_RJ[:, :-1] > values_RJ[:, 1:]).all(-1)
    if bool(has_ties_R.any()):
        order_UL = torch.sort(rows_RL[has_ties_R], dim=-1, descending=True, stable=True).indices
        indices_RK = indices_RK.masked_scatter(has_ties_R[:, None], order_UL[:, :k].contiguous())
    return indices_RK.reshape(*scores_XL.shape[:-1], k)
