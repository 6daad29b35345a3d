"""Naive gathered_rows: one row after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_rows_reference(table_NV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.gathered_rows`."""
    rows = [table_NV[row] for row in ids_TK.flatten().tolist()]
    return torch.stack(rows).view(*ids_TK.shape, -1) if rows else table_NV.new_empty(*ids_TK.shape, table_NV.shape[1])
