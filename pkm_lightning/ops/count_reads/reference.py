"""The count as it is defined, in plain torch operations: no value reaches the host, no shape depends on one.

Letters: N slots, M = N + 1 counters, T tokens, C reads a token, R = T * C.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What 1 of a weight counter stands for, and the largest weight of one read.
WEIGHT_UNIT = 2.0**-24
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
    """See `pkm_lightning.ops.count_reads`."""
    n_slots = len(counts_M) - 1
    is_slot_TC = (ids_TC >= 0) & (ids_TC < n_slots)
    if valid_T is not None:
        is_slot_TC = is_slot_TC & valid_T[:, None]
    ids_R = torch.where(is_slot_TC, ids_TC, n_slots).long().flatten()
    weights_R = weights_TC.double().abs().nan_to_num(nan=0.0).clamp(max=WEIGHT_LIMIT).flatten()
    counts_M.scatter_add_(0, ids_R, torch.ones_like(ids_R))
    weights_M.scatter_add_(0, ids_R, (weights_R / WEIGHT_UNIT + 0.5).long())
    last_M.scatter_(0, ids_R, step)
