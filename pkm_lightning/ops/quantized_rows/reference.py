"""Naive reads of quantised rows: expand the whole table, then read it as any other.

Letters: G groups per token.
"""

from __future__ import annotations

from torch import Tensor

from pkm_lightning.ops.gathered_dot.reference import gathered_dot_reference
from pkm_lightning.ops.quantized_rows.format import QuantizedRows, dequantize_rows
from pkm_lightning.ops.weighted_gather.reference import weighted_gather_reference


def quantized_gather_reference(
    rows: QuantizedRows, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """Computes `pkm_lightning.ops.quantized_gather` as (T, G, V)."""
    return weighted_gather_reference(dequantize_rows(rows), ids_TK, weights_TK, groups_TK, n_groups)


def quantized_dot_reference(rows: QuantizedRows, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.quantized_dot`."""
    return gathered_dot_reference(dequantize_rows(rows), x_TV, ids_TK)
