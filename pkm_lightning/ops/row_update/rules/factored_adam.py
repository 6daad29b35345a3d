"""Adam without momentum whose second moment is one number per row times one per column.

    q   =  mean_d(g_d**2 / c_d)
    r   <- r + a_k (q - r)                     a_k = max(1 / k, 1 - b2)
    w   <- w - lr g / (sqrt(r c) + eps)
    c_d <- c_d + a_t (p_d - c_d)               p_d = A_d / mean(A),  A_d = sum over the rows read of g_d**2 / q

r is the factor of a row and k the number of its own updates; c is the factor of the columns, with mean 1, and t the
number of the table's update. Before the first, c = 1.

**Source.** A factored second moment is that of Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, section 3): the
means of g**2 over rows and columns of a matrix, whose product over their sum estimates g**2. It is for matrices of
which each step has the whole gradient. A table is read a few rows at a time, which changes three things.

*Rows are updated at different times.* A sum over all row factors, by which Adafactor divides, would mix rows of this
step with rows last read long ago. So the columns have the scale 1 and the rows all the rest: p has mean 1 over the
columns by construction, hence c too, and r c estimates g**2 by itself.

*Rows differ in scale by orders of magnitude.* In sums of g**2 over the rows read, a few rows with large gradients would
decide on c for all. Each row counts once instead: what enters A is g**2 relative to its own mean. For the same reason q
divides by c: if E g_nd**2 = rho_n gamma_d, both q and p are unbiased given the other factor, and they are the two steps
by which the likelihood of independent normal g is maximised in turns. Since r >= a_k q, the root of the weighted mean
of (g / sqrt(r c))**2 never exceeds a_k**-0.5, as with Adam: 1 at the first update of a row, 4.5 in the long run for
b2 = 0.95. This holds with the c of the step before, so that one pass over the rows does it all.

*Rows are corrected for their own bias.* What a row misses while it is not read is no step. Adam's division by 1 - b2**k
makes its average one whose weights add up to 1; the weights a_k do so by themselves: the plain mean of the first
1 / (1 - b2) updates, from then on the moving average (Adafactor's section 7.2 has such schedules of b2). k matters
no further than 1 / (1 - b2), so a count in 8 bits that stops there is exact.

**State.** 3 bytes per row (r in bf16, k in uint8) and 4 bytes per column. That is 0.1% of an fp32 table from 750 values
per row on. Rounding r to nearest moves it by at most 2**-8 of itself per update; older roundings are forgotten as older
gradients are, so that it stays within 2**-8 / (1 - b2) of the exact average: 8% at b2 = 0.95, or 4% of the rate. b2 is
at most 0.99, where it would be 39%. For fp64 tables r and c are fp64.

Letters: N rows, V values per row, U rows that were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import KernelFactors, RowRule, RowState, UpdateStep, inverse

__all__ = ["FactoredAdam"]

_LARGEST_BETA2 = 0.99
# A column whose gradients were zero would get weight 1 / 0. This is a thousandth of the others' gradients.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True, kw_only=True)
class FactoredAdam(RowRule):
    """Adam with b1 = 0 and 3 bytes of state per row.

    Raises:
        ValueError: b1 is not 0, or b2 is above 0.99.
    """

    name = "factored_adam"
    state = {  # noqa: RUF012 - read only
        "row_square": RowState("row", torch.bfloat16),
        "updates": RowState("row", torch.uint8),
        "column_share": RowState("column"),
    }
    needs_mean_squares = True
    needs_column_sums = True
    kernels = ("cpu", "triton")

    def __post_init__(self) -> None:
        super().__post_init__()
        beta1, beta2 = self.betas
        if beta1:
            raise ValueError(
                f"betas={list(self.betas)}: factored_adam has no first moment; set the first to 0, or set "
                "table/optimizer=lazy_adam."
            )
        if beta2 > _LARGEST_BETA2:
            raise ValueError(
                f"betas={list(self.betas)}: the second must be at most {_LARGEST_BETA2}, because factored_adam keeps "
                "its moment in bf16; set table/optimizer=lazy_adam for a longer average."
            )

    def update(
        self,
        rows_UV: Tensor,
        grad_UV: Tensor,
        state: Mapping[str, Tensor],
        index_U: Tensor,
        step: UpdateStep,
        mean_squares_U: Tensor | None,
    ) -> Tensor:
        """Updates the factors of the rows and returns the rows moved by lr g / (sqrt(r c) + eps)."""
        assert mean_squares_U is not None
        row_U, updates_U = self.row_factors(state, index_U, mean_squares_U)
        state["row_square"][index_U] = row_U.to(state["row_square"].dtype)
        state["updates"][index_U] = updates_U
        root_UV = row_U.sqrt().unsqueeze(-1) * self.column_factors(state, step).sqrt()
        return rows_UV - step.lr * grad_UV / (root_UV + self.eps)

    def kernel_factors(
        self, state: Mapping[str, Tensor], index_U: Tensor, step: UpdateStep, mean_squares_U: Tensor | None
    ) -> KernelFactors:
        """Returns the root of r, and 1 / q, the factor on g**2 in the sums of the columns."""
        assert mean_squares_U is not None
        row_U, updates_U = self.row_factors(state, index_U, mean_squares_U)
        factors_2U = torch.stack([row_U.sqrt(), inverse(mean_squares_U)])
        return KernelFactors(factors_2U, {"row_square": row_U, "updates": updates_U})

    def kernel_columns(self, state: Mapping[str, Tensor], step: UpdateStep) -> Tensor:
        """Returns the root of c."""
        return self.column_factors(state, step).sqrt()

    def row_factors(
        self, state: Mapping[str, Tensor], index_U: Tensor, mean_squares_U: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns r of the rows `index_U` after an update, in the dtype of sums, and k; leaves `state` as it is."""
        long_run = 1 - self.betas[1]
        updates_U = (state["updates"][index_U] + 1).clamp(max=math.ceil(1 / long_run))
        weight_U = updates_U.to(mean_squares_U.dtype).reciprocal().clamp(min=long_run)
        before_U = state["row_square"][index_U].to(mean_squares_U.dtype)
        return before_U + weight_U * (mean_squares_U - before_U), updates_U

    def column_factors(self, state: Mapping[str, Tensor], step: UpdateStep) -> Tensor:
        """Returns c before this update, (V,)."""
        share_V = state["column_share"]
        return torch.ones_like(share_V) if step.number == 1 else share_V

    def column_weights(self, state: Mapping[str, Tensor], step: UpdateStep) -> Tensor:
        """Returns 1 / c."""
        return self.column_factors(state, step).reciprocal()

    def update_columns(self, state: Mapping[str, Tensor], sums_V: Tensor, mean: Tensor, step: UpdateStep) -> None:
        """Moves c towards the shares of the rows of this update; gradients that are all zero or hold NaN leave it."""
        weight = max(1 / step.number, 1 - self.betas[1])
        before_V = self.column_factors(state, step)
        after_V = (before_V + weight * (sums_V / mean - before_V)).clamp(min=_LEAST_SHARE)
        state["column_share"].copy_(torch.where(mean > 0, after_V, before_V))
