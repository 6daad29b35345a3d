"""The numbers per row that a rule computes from its states per row, before a kernel updates the rows.

They are few, so that torch computes them for the CPU and the GPU alike, and the kernels see no compact states.

Letters: U segments, V values per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.reference import inverse
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep
from pkm_lightning.ops.row_update.rules.factored_adam import FactoredAdam
from pkm_lightning.ops.row_update.rules.lazy_adam import LazyAdam

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient


class RowFactors(NamedTuple):
    """Numbers per row and per column in the dtype of sums; empty where the rule has none."""

    #: (2, U). Lazy Adam with a count per row: 1 - b1**k and the root of 1 - b2**k.
    #: Factored Adam: the root of r, and 1 / q, the factor on g**2 in the sums of the columns.
    rows_2U: Tensor
    #: (V,): the root of c.
    columns_V: Tensor


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
    none = RowFactors(gradient.coefficients_L.new_empty(2, 0), gradient.coefficients_L.new_empty(0))
    if len(rows_U) == 0:
        return none
    # Padding (row -1) repeats the first segment, and so writes the same values once more: a boolean index would make
    # the host wait for the number of rows. Without any read even the first segment is padding: nothing changes then.
    is_live_U, is_any_1 = rows_U >= 0, rows_U[:1] >= 0
    index_U = torch.where(is_live_U, rows_U, rows_U[:1]).clamp(min=0).long()

    def store(name: str, value_U: Tensor) -> None:
        before_U = state[name][index_U]
        state[name][index_U] = torch.where(is_any_1, value_U.to(before_U.dtype), before_U)

    if isinstance(rule, LazyAdam) and rule.bias_correction == "row":
        updates_U = rule.next_updates(state, index_U)
        store("updates", updates_U)
        return none._replace(rows_2U=rule.row_corrections(updates_U).to(none.rows_2U.dtype))
    if isinstance(rule, FactoredAdam):
        if mean_squares_U is None:
            width = gradient.source_rows_XV.shape[1]
            mean_squares_U = row_gradient_squares(gradient, rule.column_weights(state, step)) / width
        mean_squares_U = mean_squares_U * scale * scale
        mean_squares_U = torch.where(is_live_U, mean_squares_U, mean_squares_U[:1])
        row_U, updates_U = rule.row_factors(state, index_U, mean_squares_U)
        store("row_square", row_U)
        store("updates", updates_U)
        return RowFactors(torch.stack([row_U.sqrt(), inverse(mean_squares_U)]), rule.column_factors(state, step).sqrt())
    return none
