"""The row update as in a paper: a dense N x V gradient, then the rule on the rows that were read.

Letters: N rows, V values per row, U rows that were read, Z = U + 1 limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rounding import round_stochastically
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep
from pkm_lightning.ops.row_update.rules.base import inverse

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    return _dense(gradient, gradient.n_rows).norm()


def row_gradient_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    rows_U = gradient.segments.rows_U.long()
    squares_UV = _dense(gradient, gradient.n_rows)[rows_U.clamp(min=0)].square()
    squares_U = (squares_UV if weights_V is None else squares_UV * weights_V).sum(-1)
    return torch.where(rows_U >= 0, squares_U, 0.0)


def row_gradient_dots(table_NV: Tensor, gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_dots`."""
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, source_rows_XV = gradient
    dots_L = torch.zeros_like(coefficients_L)
    for row, start, end in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        for read in order_L[start:end].tolist():
            source_V = source_rows_XV[sources_L[read]].to(dots_L.dtype)
            dots_L[read] = (table_NV[row].to(dots_L.dtype) * source_V).sum()
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
    grad_NV = _dense(gradient, len(table_NV)) * scale
    rows_U = gradient.segments.rows_U.long()
    if mean_squares_U is not None:
        mean_squares_U = mean_squares_U[rows_U >= 0] * scale * scale
    rows_U = rows_U[rows_U >= 0]
    before_UV = table_NV[rows_U].to(grad_NV.dtype)
    after_UV, sums_V = updated_rows(before_UV, grad_NV[rows_U], rule, step, state, rows_U, mean_squares_U)
    is_bf16 = table_NV.dtype is torch.bfloat16
    table_NV[rows_U] = round_stochastically(after_UV, rows_U, step.seed) if is_bf16 else after_UV
    return sums_V


def updated_rows(
    rows_UV: Tensor,
    grad_UV: Tensor,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    index_U: Tensor,
    mean_squares_U: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Updates the entries of `state` of the rows by `rule`.

    Args:
        mean_squares_U: mean of the weighted g**2 over whole rows of which these are a part; None: these are whole.

    Returns:
        The rows after decay and one update, and the sums that `RowRule.update_columns` takes, where the rule needs
        them.
    """
    squares_UV = grad_UV.square()
    if rule.needs_mean_squares and mean_squares_U is None:
        weights_V = rule.column_weights(state, step)
        mean_squares_U = (squares_UV if weights_V is None else squares_UV * weights_V).mean(-1)
    after_UV = rule.update(rule.decay(rows_UV, step), grad_UV, state, index_U, step, mean_squares_U)
    if not rule.needs_column_sums:
        return after_UV, None
    assert mean_squares_U is not None
    return after_UV, (squares_UV * inverse(mean_squares_U).unsqueeze(-1)).sum(0)


def _dense(gradient: RowGradient, n_rows: int) -> Tensor:
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, source_rows_XV = gradient
    grad_NV = torch.zeros(n_rows, source_rows_XV.shape[1], dtype=coefficients_L.dtype, device=coefficients_L.device)
    for row, start, end in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        for read in order_L[start:end].tolist():
            grad_NV[row] += coefficients_L[read] * source_rows_XV[sources_L[read]].to(grad_NV.dtype)
    return grad_NV
