"""product_combine in torch operations, on any device: top-k of the pairs that can be among the best K.

Letters: X any leading shape, J sub-keys kept per half, C candidate pairs; K slots kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.product_topk.candidates import cached_ranks, candidate_ranks, sum_of_scores
from pkm_lightning.ops.ranked_topk.eager import ranked_topk_eager


def product_combine_eager(
    values1_XJ: Tensor, indices1_XJ: Tensor, values2_XJ: Tensor, indices2_XJ: Tensor, n_keys: int, k: int
) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.product_combine` over the candidate pairs; README.md proves that they suffice."""
    with torch.no_grad():
        # A traced graph holds the ranks as constants; reading a cache would break it.
        ranks = candidate_ranks if torch.compiler.is_compiling() else cached_ranks
        rank1_C, rank2_C = ranks(k, values1_XJ.shape[-1], values1_XJ.device)
        sums_XC = sum_of_scores(values1_XJ[..., rank1_C], values2_XJ[..., rank2_C])
        best_XK = ranked_topk_eager(sums_XC, k)
        rank1_XK, rank2_XK = rank1_C[best_XK].long(), rank2_C[best_XK].long()
    # The sums of the chosen pairs once more, this time with a gradient, which then has K entries instead of C.
    sums_XK = sum_of_scores(values1_XJ.gather(-1, rank1_XK), values2_XJ.gather(-1, rank2_XK))
    return sums_XK, (indices1_XJ.gather(-1, rank1_XK) * n_keys + indices2_XJ.gather(-1, rank2_XK)).int()
