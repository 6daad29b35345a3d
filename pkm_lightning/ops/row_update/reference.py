"""The row update as it is written on paper: a dense N x D gradient, then the rule on the rows that were read.

Letters: N rows, D values a row, U rows read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rounding import round_stochastically
from pkm_lightning.ops.row_update.rules import RowRule

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """See `pkm_lightning.ops.row_update`."""
    return _dense(gradient, gradient.n_rows).norm()


def row_gradient_squares(gradient: RowGradient) -> Tensor:
    """See `pkm_lightning.ops.row_update`."""
    rows_U = gradient.segments.rows_U.long()
    squares_U = _dense(gradient, gradient.n_rows)[rows_U.clamp(min=0)].square().sum(-1)
    return torch.where(rows_U >= 0, squares_U, 0.0)


def row_update(
    table_ND: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    row_squares_U: Tensor | None,
) -> None:
    """See `pkm_lightning.ops.row_update`."""
    grad_ND = _dense(gradient, len(table_ND)) * scale
    rows_U = gradient.segments.rows_U.long()
    if row_squares_U is not None:
        row_squares_U = row_squares_U[rows_U >= 0] * scale * scale
    rows_U = rows_U[rows_U >= 0]
    before_UD = table_ND[rows_U].to(grad_ND.dtype)
    after_UD = moved(before_UD, grad_ND[rows_U], rule, state, rows_U, row_squares_U)
    is_bf16 = table_ND.dtype is torch.bfloat16
    table_ND[rows_U] = round_stochastically(after_UD, rows_U, rule.seed) if is_bf16 else after_UD


def moved(
    rows_UD: Tensor,
    grad_UD: Tensor,
    rule: RowRule,
    state: Mapping[str, Tensor],
    index_U: Tensor,
    row_squares_U: Tensor | None,
) -> Tensor:
    """The rows after one update by `rule`; moves their entries of `state`. `row_squares_U`: mean(g**2) of the whole
    rows, of which these are a part."""
    beta1, beta2 = rule.betas
    correction1, root_correction2 = rule.corrections
    rows_UD = rows_UD - rule.lr * rule.weight_decay * rows_UD
    if rule.kind == "sgd":
        return rows_UD - rule.lr * grad_UD
    if rule.kind == "row_adagrad":
        sum_U = state["sum"][index_U] + (grad_UD.square().mean(-1) if row_squares_U is None else row_squares_U)
        state["sum"][index_U] = sum_U
        return rows_UD - rule.lr * grad_UD / (sum_U.sqrt().unsqueeze(-1) + rule.eps)
    if rule.kind == "lazy_adam":
        mean_UD = beta1 * state["exp_avg"][index_U] + (1 - beta1) * grad_UD
        square_UD = beta2 * state["exp_avg_sq"][index_U] + (1 - beta2) * grad_UD.square()
        state["exp_avg"][index_U], state["exp_avg_sq"][index_U] = mean_UD, square_UD
        return rows_UD - rule.lr / correction1 * mean_UD / (square_UD.sqrt() / root_correction2 + rule.eps)
    missed_U = (rule.step - state["last_step"][index_U]).to(grad_UD.dtype)
    square_UD = state["exp_avg_sq"][index_U] * (beta2**missed_U).unsqueeze(-1) + (1 - beta2) * grad_UD.square()
    state["exp_avg_sq"][index_U], state["last_step"][index_U] = square_UD, rule.step
    return rows_UD - rule.lr * grad_UD / (square_UD.sqrt() / root_correction2 + rule.eps)


def _dense(gradient: RowGradient, n_rows: int) -> Tensor:
    _, (order_L, rows_U, starts_V), coefficients_L, sources_L, source_rows_XD = gradient
    grad_ND = torch.zeros(n_rows, source_rows_XD.shape[1], dtype=coefficients_L.dtype, device=coefficients_L.device)
    for row, start, end in zip(rows_U.tolist(), starts_V[:-1].tolist(), starts_V[1:].tolist(), strict=True):
        for read in order_L[start:end].tolist():
            grad_ND[row] += coefficients_L[read] * source_rows_XD[sources_L[read]].to(grad_ND.dtype)
    return grad_ND
