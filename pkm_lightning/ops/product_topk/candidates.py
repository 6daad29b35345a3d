"""Which pairs of ranks can be among the K best sums (README.md has the proof), and the sum of two scores.

Letters: X any leading shape, J sub-keys kept per half, C candidate pairs; K slots kept.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def candidate_pairs(k: int, per_half: int) -> list[tuple[int, int]]:
    """Lists the ranks (i, j), from 0 and in lexicographic order, with (i + 1) * (j + 1) <= k.

    At k = 32 they are 119 pairs of 1,024.
    """
    return [(i, j) for i in range(min(k, per_half)) for j in range(min(k // (i + 1), per_half))]


def candidate_ranks(k: int, per_half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the ranks of `candidate_pairs` as two tensors."""
    rank1_C, rank2_C = torch.tensor(candidate_pairs(k, per_half), dtype=torch.int32, device=device).unbind(-1)
    return rank1_C.contiguous(), rank2_C.contiguous()


def cached_ranks(k: int, per_half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns `candidate_ranks` from a cache, for code that is not traced (a cache would break a graph)."""
    # Tensors that are made under a fake mode are fake, and would stay so in the cache.
    return candidate_ranks(k, per_half, device) if detect_fake_mode() else _cached(k, per_half, device)


_cached = functools.lru_cache(maxsize=64)(candidate_ranks)


def sum_of_scores(scores1_X: Tensor, scores2_X: Tensor) -> Tensor:
    """Computes `scores1 + scores2` with (+inf) + (-inf) = -inf; sums of -inf have no gradient."""
    sums_X = scores1_X + scores2_X
    opposite_X = sums_X.isnan() & ~(scores1_X.isnan() | scores2_X.isnan())
    # The fill replaces -inf by a constant -inf, which stops the gradient.
    return sums_X.masked_fill(opposite_X | (sums_X == -math.inf), -math.inf)
