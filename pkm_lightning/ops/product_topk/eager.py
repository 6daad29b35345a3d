"""Product top-k in plain torch operations, on any device: top-k of each half, then of the pairs that can still win.

Letters: `...` any leading shape, S sub-keys a half, K slots kept, J = min(K, S) kept a half, C candidate pairs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pkm_lightning.ops.ranked_topk import ranked_topk


def product_topk_eager(scores1_XS: Tensor, scores2_XS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.product_topk`; README.md there proves that the dropped pairs cannot win."""
    n_keys = scores1_XS.shape[-1]
    per_half = min(k, n_keys)
    with torch.no_grad():
        key1_XJ = ranked_topk(scores1_XS, per_half)
        key2_XJ = ranked_topk(scores2_XS, per_half)
        # A traced graph holds the ranks as constants; a cache inside it would only break the trace.
        ranks = candidate_ranks if torch.compiler.is_compiling() else _cached_ranks
        rank1_C, rank2_C = ranks(k, per_half, scores1_XS.device)
        half1_XC = scores1_XS.gather(-1, key1_XJ)[..., rank1_C]
        half2_XC = scores2_XS.gather(-1, key2_XJ)[..., rank2_C]
        best_XK = ranked_topk(half1_XC + half2_XC, k)
        key1_XK = key1_XJ.gather(-1, rank1_C[best_XK])
        key2_XK = key2_XJ.gather(-1, rank2_C[best_XK])
    sums_XK = scores1_XS.gather(-1, key1_XK) + scores2_XS.gather(-1, key2_XK)
    return sums_XK, (key1_XK * n_keys + key2_XK).int()


def candidate_ranks(k: int, per_half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (i, j) from 0, in lexicographic order, with (i + 1) * (j + 1) <= k: 119 pairs of 1,024 at k = 32."""
    pairs = [(i, j) for i in range(per_half) for j in range(per_half) if (i + 1) * (j + 1) <= k]
    rank1_C, rank2_C = torch.tensor(pairs, device=device).unbind(-1)
    return rank1_C.contiguous(), rank2_C.contiguous()


_cached_ranks = functools.lru_cache(maxsize=64)(candidate_ranks)
