"""product_search on the CPU: the kernels of half_topk and product_topk, in the order of the tokens from end to end.

Queries, scores and slots of a token lie together, so that nothing is transposed or copied between the steps.

Letters: Y sets of sub-keys, X = 2 * H half queries of a token, R = T * H rows, F dimension of a half key; J sub-keys
kept per half; 2 is the two halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.half_topk.cpu import add_gradients_by_token, best_keys_by_token
from pkm_lightning.ops.product_topk.cpu import candidate_arrays, combine_halves, split_gradient
from pkm_lightning.ops.ranked_topk.cpu import search as search_by_token

#: Most values of a set of keys that are scored query by query, and stay in the cache meanwhile. Matrix products of many
#: queries load each value less often; with few values that gains less than scores that are never in memory.
_FEW_VALUES = 2**14


def search(q_TH2F: Tensor, keys_Y2SF: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sums, slots and candidates (T, H, K) and sub-keys (T, X, J); both tensors contiguous."""
    (tokens, heads), n_keys = q_TH2F.shape[:2], keys_Y2SF.shape[2]
    per_half = min(k, n_keys)
    q_TXF, keys_YSF = q_TH2F.flatten(1, 2), keys_Y2SF.flatten(0, 1)
    sums_THK, indices_TXJ = (
        q_TH2F.new_empty(tokens, heads, k),
        torch.empty(*q_TXF.shape[:2], per_half, dtype=torch.int32),
    )
    ids_THK, chosen_THK = (torch.empty(sums_THK.shape, dtype=torch.int32) for _ in range(2))
    results = sums_THK, ids_THK, chosen_THK
    if keys_YSF[0].numel() <= _FEW_VALUES:
        ranks = candidate_arrays(k, per_half)
        search_by_token(q_TXF, keys_YSF.mT.contiguous(), *ranks, *results, indices_TXJ)
    else:
        values_TXJ = q_TH2F.new_empty(indices_TXJ.shape)
        best_keys_by_token(q_TXF, keys_YSF, values_TXJ, indices_TXJ)
        values_R2J, indices_R2J = (part_TXJ.view(-1, 2, per_half) for part_TXJ in (values_TXJ, indices_TXJ))
        combine_halves(values_R2J, indices_R2J, n_keys, *(part_THK.view(-1, k) for part_THK in results))
    return *results, indices_TXJ


def gradients(
    grad_THK: Tensor, sums_THK: Tensor, chosen_THK: Tensor, indices_TXJ: Tensor, q_TH2F: Tensor, keys_Y2SF: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of queries and keys; all tensors contiguous."""
    q_grad_TH2F, keys_grad_Y2SF = torch.empty_like(q_TH2F), torch.zeros_like(keys_Y2SF)
    grad_TXJ = grad_THK.new_empty(indices_TXJ.shape)
    grad_RK, sums_RK, chosen_RK = (part.flatten(0, 1) for part in (grad_THK, sums_THK, chosen_THK))
    split_gradient(grad_RK, sums_RK, chosen_RK, grad_TXJ.view(-1, 2, grad_TXJ.shape[-1]))
    q_TXF, q_grad_TXF, keys_YSF, keys_grad_YSF = (
        part.view(*shape, part.shape[-1])
        for part, shape in (
            (q_TH2F, indices_TXJ.shape[:2]),
            (q_grad_TH2F, indices_TXJ.shape[:2]),
            (keys_Y2SF, (-1, keys_Y2SF.shape[2])),
            (keys_grad_Y2SF, (-1, keys_Y2SF.shape[2])),
        )
    )
    add_gradients_by_token(grad_TXJ, indices_TXJ, q_TXF, keys_YSF, q_grad_TXF, keys_grad_YSF)
    return q_grad_TH2F, keys_grad_Y2SF
