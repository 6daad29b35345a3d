"""Naive count_reads in torch operations, which also serves GPUs: its shapes do not depend on values.

Letters: M = N + 1 counters, C reads per token, R = T * C reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Weight that 1 of a weight counter stands for.
WEIGHT_UNIT = 2.0**-24
#: Largest weight that one read counts with: 2**40 units, so that int64 counters have room for 2**23 such reads.
WEIGHT_LIMIT = 2.0**16


def count_reads_reference(
    counts_M: Tensor,
    weights_M: Tensor,
    last_M: Tensor,
    ids_TC: Tensor,
    weights_TC: Tensor,
    valid_T: Tensor | None,
    step: int,
) -> None:
    """Counts with scatter operations; the arguments are those of `pkm_lightning.ops.count_reads`."""
    n_slots = len(counts_M) - 1
    is_slot_TC = (ids_TC >= 0) & (ids_TC < n_slots)
    if valid_T is not None:
        is_slot_TC = is_slot_TC & valid_T[:, None]
    # Padding goes to the last counter: dropping it instead would give tensors whose shape depends on values.
    ids_R = torch.where(is_slot_TC, ids_TC, n_slots).long().flatten()
    # In float64: the units of one read need up to 41 bits.
    weights_R = weights_TC.double().abs().nan_to_num(nan=0.0).clamp(max=WEIGHT_LIMIT).flatten()
    counts_M.scatter_add_(0, ids_R, torch.ones_like(ids_R))
    weights_M.scatter_add_(0, ids_R, (weights_R / WEIGHT_UNIT + 0.5).long())
    last_M.scatter_(0, ids_R, step)
