"""A model as it would be with quantised weights: each value is replaced by the level that its codes stand for.

Tables then hold what `export quantize=` writes. Other matrices, which no format of the package quantises, are rounded
in the same way, 32 values per scale along their last dimension, so that models without tables can be compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.memory import ValueTable
from pkm_lightning.ops import quantize_rows
from pkm_lightning.ops.quantized_rows import WIDTHS, dequantize_rows, stored_shapes

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


def weight_bytes(model: Transformer) -> int:
    """Returns the bytes of all parameters and tables, codes and scales of quantised ones included."""
    tables: list[ValueTable] = list(model.value_tables)
    of_tables = {id(weight) for table in tables for weight in table.parameters()}
    # Of a parameter that DeepSpeed has partitioned `numel` is that of a part that is gathered for use.
    others = sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if id(p) not in of_tables
    )
    return others + sum(table.bytes_of(table.size) for table in tables)


@torch.no_grad()
def _rounded(weight: nn.Parameter, bits: int) -> tuple[torch.Tensor, int]:
    """Returns the values as they were, and the bytes that are saved; rounds the parameter in place."""
    before, rows = weight.detach().clone(), weight.detach().reshape(-1, weight.shape[-1])
    weight.copy_(dequantize_rows(quantize_rows(rows, bits)).view_as(weight))
    codes, scales = stored_shapes(rows.shape[0], rows.shape[1], bits)
    return before, weight.numel() * weight.element_size() - math.prod(codes) - 2 * math.prod(scales)


@contextlib.contextmanager
def rounded_weights(model: Transformer, width: str, *, tables_only: bool) -> Iterator[int | None]:
    """Rounds weights for the time of the block, and gives the bytes that all weights would take then.

    None where there is nothing to round: no table, or only quantised ones.

    Args:
        model: whole in this process, in evaluation mode.
        width: `int8`, `int4` or `int2`.
        tables_only: round the rows of value tables alone, else all parameters of two or more dimensions.
    """
    tables = [table.weight for table in model.value_tables if hasattr(table, "weight")]
    weights = tables if tables_only else [p for p in model.parameters() if p.ndim > 1]
    n_bytes = weight_bytes(model)
    before = []
    try:
        for weight in weights:
            values, saved = _rounded(weight, WIDTHS[width])
            before.append(values)
            n_bytes -= saved
        yield n_bytes if weights else None
    finally:
        for weight, values in zip(weights, before, strict=False):
            weight.data.copy_(values)
