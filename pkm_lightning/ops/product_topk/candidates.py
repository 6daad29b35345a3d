"""Which pairs of ranks can be among the best K sums, and how two scores are added; README.md here has the proof.

Letters: `...` any leading shape, K slots kept, J kept a half, C candidate pairs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def candidate_ranks(k: int, per_half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (i, j) from 0, in lexicographic order, with (i + 1) * (j + 1) <= k: 119 pairs of 1,024 at k = 32."""
    pairs = [(i, j) for i in range(min(k, per_half)) for j in range(min(k // (i + 1), per_half))]
    rank1_C, rank2_C = torch.tensor(pairs, dtype=torch.int32, device=device).unbind(-1)
    return rank1_C.contiguous(), rank2_C.contiguous()


def cached_ranks(k: int, per_half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for code that is not traced: in a graph, which holds the ranks as constants, a cache would break it."""
    # Tensors that are made under a fake mode are fake, and would stay so in the cache.
    return candidate_ranks(k, per_half, device) if detect_fake_mode() else _kept(k, per_half, device)


_kept = functools.lru_cache(maxsize=64)(candidate_ranks)


def sum_of_scores(scores1_X: Tensor, scores2_X: Tensor) -> Tensor:
    """`scores1 + scores2`, where +inf and -inf make -inf; a sum of -inf is a constant, without gradient."""
    sums_X = scores1_X + scores2_X
    opposite_X = sums_X.isnan() & ~(scores1_X.isnan() | scores2_X.isnan())
    return sums_X.masked_fill(opposite_X | (sums_X == -math.inf), -math.inf)
