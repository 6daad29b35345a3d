"""The size of a product-key memory is limited by its slot ids, which are int32."""

from __future__ import annotations

import math

import torch

#: Most sub-keys per half: the largest n with n * n <= 2**31 - 1, which is 46,340.
MAX_SUB_KEYS = math.isqrt(torch.iinfo(torch.int32).max)


def check_slots(op: str, n_keys: int, k: int) -> None:
    """Checks that `n_keys` sub-keys per half make `k` slots or more, and no more than int32 ids can number.

    Raises:
        ValueError: `k` is out of range, or `n_keys` is above `MAX_SUB_KEYS`.
    """
    n_slots = n_keys**2
    if not 1 <= k <= n_slots:
        raise ValueError(f"{op}: k={k} is out of range; allowed: 1 to {n_slots} (sub-keys squared).")
    if n_keys > MAX_SUB_KEYS:
        raise ValueError(
            f"{op}: {n_keys} sub-keys per half make {n_slots} slots, which do not fit int32 ids; allowed: at most "
            f"{MAX_SUB_KEYS:,} sub-keys per half."
        )
