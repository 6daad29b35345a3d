"""The gathered inner products as they are written on paper: gather T * K rows, multiply, add up.

Letters: N rows, D values a row, T tokens, K rows a token.
"""

from __future__ import annotations

from torch import Tensor


def gathered_dot_reference(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """See `pkm_lightning.ops.gathered_dot`; keeps T * K * D values in memory."""
    return (table_ND[ids_TK.long()] * x_TD.unsqueeze(1)).sum(dim=-1)
