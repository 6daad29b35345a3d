"""Figures of how reads spread over slots, computed from counts (Lample et al. 2019, arXiv 1907.05242, section 4.2).

With z the reads (or weights) per slot, normalised to the sum 1:

| figure | formula | range |
|---|---|---|
| `used_percent` | 100 * #{z > 0} / N | 0 to 100 |
| `kl_count`, `kl_weight` | log N + sum of z log z, nats: KL from uniform | 0 (uniform) to log N (one slot) |
| `gini` | 1 - 2 * mean(cumsum(z ascending)) | -1/N (uniform) to 1 - 2/N (one slot) |
| `top50`, `top90`, `top99` | the smallest number of slots that hold 50, 90, 99% of the reads | 1 to N |
| `kl_rows`, `kl_columns` | KL of the sub-keys of the first and of the second half | 0 to log S |
| `dead` | slots that were not read for n steps | 0 to N |
| `effective` | exp of the entropy of the K normalised weights of one read, mean over reads | 1 to K |

Without any read, the figures of z are NaN, and `used_percent` is 0. In all of `usage`, N is the number of slots: rows
of a table, or experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHARES = (50, 90, 99)


def spread(counts_N: Tensor, weights_N: Tensor, n_keys: int | None = None) -> dict[str, float]:
    """Returns all figures of the table above that follow from counts and weights.

    Args:
        counts_N: reads of each slot, int64.
        weights_N: sum of |weight| of each slot, in any unit.
        n_keys: sub-keys per half, where the slot of sub-keys i and j is i * n_keys + j; adds `kl_rows`, `kl_columns`.
    """
    figures: dict[str, float] = {
        **breadth(counts_N, weights_N),
        **concentration(counts_N),
    }
    if n_keys is not None:
        counts_SS = counts_N.view(n_keys, n_keys)
        figures["kl_rows"] = kl_from_uniform(counts_SS.sum(1))
        figures["kl_columns"] = kl_from_uniform(counts_SS.sum(0))
    return figures


def breadth(counts_N: Tensor, weights_N: Tensor) -> dict[str, float]:
    """Returns `used_percent`, `kl_count` and `kl_weight`, which need no sort."""
    return {
        "used_percent": 100 * int((counts_N > 0).sum()) / len(counts_N),
        "kl_count": kl_from_uniform(counts_N),
        "kl_weight": kl_from_uniform(weights_N),
    }


def kl_from_uniform(amounts_N: Tensor) -> float:
    """Returns `log N + sum z log z` in nats; NaN if all amounts are 0."""
    z_N = _share(amounts_N)
    return math.log(len(amounts_N)) + float(torch.xlogy(z_N, z_N).sum())


def concentration(counts_N: Tensor) -> dict[str, float]:
    """Returns `gini` and the `top` figures, from one sort."""
    rising_N = counts_N.sort().values
    figures = {"gini": 1 - 2 * float(_share(rising_N).cumsum(0).mean())}
    held_N = rising_N.flip(0).cumsum(0)
    total = int(held_N[-1])
    for share in SHARES:
        # In integers, since half of an even total must be reached exactly.
        short = int((held_N * 100 < share * total).sum())
        figures[f"top{share}"] = float(short + 1) if total else math.nan
    return figures


def dead_slots(last_N: Tensor, step: int, dead_after: int) -> Tensor:
    """Returns True for slots whose last read is `dead_after` steps or more before the end of `step`, (N,) bool."""
    return step - last_N >= dead_after


def effective_slots(weights_THK: Tensor, valid_T: Tensor | None) -> Tensor:
    """Returns the sum over the reads of real tokens of their effective number of slots, and their number, (2,) fp64.

    A read whose weights are all 0, or not finite, does not count.
    """
    amounts_THK = weights_THK.double().abs()
    total_TH = amounts_THK.sum(-1)
    counts_TH = torch.isfinite(total_TH) & (total_TH > 0)
    if valid_T is not None:
        counts_TH = counts_TH & valid_T[:, None]
    # Where a read does not count, 1 avoids a division by 0, whose NaN would survive the sum.
    z_THK = amounts_THK / torch.where(counts_TH, total_TH, 1.0)[..., None]
    effective_TH = torch.exp(-torch.xlogy(z_THK, z_THK).sum(-1))
    return torch.stack([torch.where(counts_TH, effective_TH, 0.0).sum(), counts_TH.double().sum()])


def _share(amounts_N: Tensor) -> Tensor:
    return amounts_N.double() / amounts_N.double().sum()
