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

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    return _dense(gradient, gradient.n_rows).norm()


def row_gradient_squares(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    rows_U = gradient.segments.rows_U.long()
    squares_U = _dense(gradient, gradient.n_rows)[rows_U.clamp(min=0)].square().sum(-1)
    return torch.where(rows_U >= 0, squares_U, 0.0)


def row_update(
    table_NV: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    mean_squares_U: Tensor | None,
) -> None:
    """Computes `pkm_lightning.ops.row_update.row_update`."""
    grad_NV = _dense(gradient, len(table_NV)) * scale
    rows_U = gradient.segments.rows_U.long()
    if mean_squares_U is not None:
        mean_squares_U = mean_squares_U[rows_U >= 0] * scale * scale
    rows_U = rows_U[rows_U >= 0]
    before_UV = table_NV[rows_U].to(grad_NV.dtype)
    after_UV = updated_rows(before_UV, grad_NV[rows_U], rule, step, state, rows_U, mean_squares_U)
    is_bf16 = table_NV.dtype is torch.bfloat16
    table_NV[rows_U] = round_stochastically(after_UV, rows_U, step.seed) if is_bf16 else after_UV


def updated_rows(
    rows_UV: Tensor,
    grad_UV: Tensor,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    index_U: Tensor,
    mean_squares_U: Tensor | None,
) -> Tensor:
    """Returns the rows after decay and one update by `rule`, and updates their entries of `state`.

    `mean_squares_U` is the mean of g**2 over whole rows of which these are a part; None: these are whole.
    """
    if rule.needs_mean_squares and mean_squares_U is None:
        mean_squares_U = grad_UV.square().mean(-1)
    return rule.update(rule.decay(rows_UV, step), grad_UV, state, index_U, step, mean_squares_U)


def _dense(gradient: RowGradient, n_rows: int) -> Tensor:
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, source_rows_XV = gradient
    grad_NV = torch.zeros(n_rows, source_rows_XV.shape[1], dtype=coefficients_L.dtype, device=coefficients_L.device)
    for row, start, end in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        for read in order_L[start:end].tolist():
            grad_NV[row] += coefficients_L[read] * source_rows_XV[sources_L[read]].to(grad_NV.dtype)
    return grad_NV
