"""The weighted gather as it is written on paper: gather T * K rows, weight them, add them up.

Letters: N rows, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

from torch import Tensor


def weighted_gather_reference(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`; keeps T * K * D values in memory."""
    rows_TKD = table_ND[ids_TK.long()]
    return (weights_TK.to(table_ND.dtype).unsqueeze(-1) * rows_TKD).sum(dim=1)
