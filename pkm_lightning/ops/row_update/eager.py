"""The row update in plain torch operations, on any device and for any rule.

It works on chunks of rows, so that only the gradient of one chunk is in memory at a time.

Letters: N rows, V values per row, U rows that were read, Z = U + 1 limits, C rows of
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.ops.row_gradients import row_gradients
from pkm_lightning.ops.row_update.reference import updated_rows
from pkm_lightning.ops.row_update.rounding import round_stochastically
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep
from pkm_lightning.ops.segments import Segments

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient

_CHUNK_VALUES = 2**22  # values of a chunk's gradient: 16 MiB in fp32


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    squares = [grad_CV.square().sum() for _, grad_CV in _chunks(gradient)]
    return torch.stack(squares).sum().sqrt() if squares else gradient.coefficients_L.new_zeros(())


def row_gradient_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    weights = 1.0 if weights_V is None else weights_V
    squares = [(grad_CV.square() * weights).sum(-1) for _, grad_CV in _chunks(gradient)]
    return torch.cat(squares) if squares else gradient.coefficients_L.new_zeros(0)


def row_gradient_dots(table_NV: Tensor, gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_dots`."""
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, source_rows_XV = gradient
    dots_L = torch.zeros_like(coefficients_L)
    rows_L = rows_U.long().repeat_interleave(starts_Z.diff())  # an empty segment (row -1) has no read
    size = max(1, _CHUNK_VALUES // max(1, table_NV.shape[1]))
    for rows_C, order_C in zip(rows_L.split(size), order_L[: len(rows_L)].split(size), strict=True):
        source_rows_CV = source_rows_XV[sources_L[order_C].long()].to(dots_L.dtype)
        dots_L[order_C] = (table_NV[rows_C].to(dots_L.dtype) * source_rows_CV).sum(-1)
    return dots_L


def row_update(
    table_NV: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    mean_squares_U: Tensor | None,
) -> Tensor | None:
    """Updates the rows; returns the sums that `RowRule.update_columns` takes, where the rule needs them."""
    start = 0
    total_V = None
    if rule.needs_column_sums:
        total_V = gradient.coefficients_L.new_zeros(table_NV.shape[1])
    for rows_C, grad_CV in _chunks(gradient):
        squares_C = None if mean_squares_U is None else mean_squares_U[start : start + len(rows_C)] * scale * scale
        start += len(rows_C)
        # Segments of an accelerator are padded with row -1.
        if grad_CV.device.type != "cpu":
            live_C = rows_C >= 0
            rows_C, grad_CV = rows_C[live_C], grad_CV[live_C]
            squares_C = None if squares_C is None else squares_C[live_C]
        index_C = rows_C.long()
        before_CV = table_NV[index_C].to(grad_CV.dtype)
        after_CV, sums_V = updated_rows(before_CV, grad_CV * scale, rule, step, state, index_C, squares_C)
        if total_V is not None and sums_V is not None:
            total_V += sums_V
        if table_NV.dtype is torch.bfloat16:
            after_CV = round_stochastically(after_CV, index_C, step.seed)
        table_NV.index_copy_(0, index_C, after_CV)
    return total_V


def _chunks(gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the rows of each chunk and their gradients, (C,) and (C, V)."""
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, source_rows_XV = gradient
    size = max(1, _CHUNK_VALUES // max(1, source_rows_XV.shape[1]))
    for start in range(0, len(rows_U), size):
        limits_Z = starts_Z[start : start + size + 1]
        reads = slice(int(limits_Z[0]), int(limits_Z[-1]))
        chosen_L = order_L[reads]
        in_order_L = torch.arange(len(chosen_L), device=chosen_L.device)
        part = Segments(in_order_L, rows_U[start : start + size], limits_Z - limits_Z[0])
        yield part.rows_U, row_gradients(part, coefficients_L[chosen_L], sources_L[chosen_L], source_rows_XV)
