"""The numbers per row that a rule computes from its states per row, before a kernel updates the rows.

They are few, so that torch computes them for the CPU and the GPU alike, and the kernels see no compact states.

Letters: U segments, V values per row, F numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient


class RowFactors(NamedTuple):
    """What the rule's `kernel_factors` and `kernel_columns` return, in the dtype of sums; empty where that is None."""

    #: (F, U), or (2, 0).
    rows_FU: Tensor
    #: (V,), or (0,).
    columns_V: Tensor


def no_factors(gradient: RowGradient) -> RowFactors:
    """Returns the factors of a kernel that takes none."""
    return RowFactors(gradient.coefficients_L.new_empty(2, 0), gradient.coefficients_L.new_empty(0))


def row_factors(
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    mean_squares_U: Tensor | None,
    row_gradient_squares: Callable[[RowGradient, Tensor | None], Tensor],
) -> RowFactors:
    """Returns the factors of an update and moves the states per row that they come from.

    Args:
        gradient, rule, step, state, scale, mean_squares_U: as in `pkm_lightning.ops.row_update.row_update`.
        row_gradient_squares: that of the backend.
    """
    rows_U = gradient.segments.rows_U
    none = no_factors(gradient)
    if len(rows_U) == 0:
        return none
    if not (rule.needs_mean_squares or any(part.per == "row" for part in rule.state.values())):
        # Nothing is known of a row: the host needs no launches to find the rows that were read.
        columns_V = rule.kernel_columns(state, step)
        return none if columns_V is None else none._replace(columns_V=columns_V)
    # Padding (row -1) repeats the first segment, and so writes the same values once more: a boolean index would make
    # the host wait for the number of rows. Without any read even the first segment is padding: nothing changes then.
    is_live_U, is_any_1 = rows_U >= 0, rows_U[:1] >= 0
    index_U = torch.where(is_live_U, rows_U, rows_U[:1]).clamp(min=0).long()
    if rule.needs_mean_squares:
        if mean_squares_U is None:
            width = gradient.source_rows_XV.shape[1]
            mean_squares_U = row_gradient_squares(gradient, rule.column_weights(state, step)) / width
        mean_squares_U = mean_squares_U * scale * scale
        mean_squares_U = torch.where(is_live_U, mean_squares_U, mean_squares_U[:1])
    factors = rule.kernel_factors(state, index_U, step, mean_squares_U)
    columns_V = rule.kernel_columns(state, step)
    if factors is not None:
        for name, value_U in factors.states.items():
            before_U = state[name][index_U]
            state[name][index_U] = torch.where(is_any_1, value_U.to(before_U.dtype), before_U)
    return RowFactors(
        none.rows_FU if factors is None else factors.rows_FU.to(none.rows_FU.dtype),
        none.columns_V if columns_V is None else columns_V,
    )
