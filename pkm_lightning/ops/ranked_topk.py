"""Top-k with a defined order of equal scores: what experts, candidates and preselections are chosen by.

Letters: `...` any leading shape, S scores, K kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def ranked_topk(scores_XS: Float[Tensor, "*X S"], k: int) -> Int[Tensor, "*X K"]:
    """Indices of the `k` largest scores, best first, equal scores by lower index (which `torch.topk` leaves open)."""
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
