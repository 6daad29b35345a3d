"""Row-wise Adagrad: one learning rate per row (Gupta et al. 2014, "Training Highly Multiclass Classifiers", section 5).

    s <- s + mean(g**2)
    w <- w - lr g / (sqrt(s) + eps)

A zero gradient moves nothing, so without weight decay this is the dense algorithm.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import KernelFactors, RowRule, RowState, UpdateStep

__all__ = ["RowAdagrad"]


@dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowRule):
    """Adagrad with one sum per row instead of one per value, so that its state needs almost no memory."""

    name = "row_adagrad"
    state = {"sum": RowState("row")}  # noqa: RUF012 - read only
    needs_mean_squares = True
    kernels = ("cpu", "triton")

    def update(
        self,
        rows_UV: Tensor,
        grad_UV: Tensor,
        state: Mapping[str, Tensor],
        index_U: Tensor,
        step: UpdateStep,
        mean_squares_U: Tensor | None,
    ) -> Tensor:
        """Adds mean(g**2) to the sums of the rows and returns the rows moved by lr g / (sqrt(s) + eps)."""
        assert mean_squares_U is not None
        sum_U = state["sum"][index_U] + mean_squares_U
        state["sum"][index_U] = sum_U
        return rows_UV - step.lr * grad_UV / (sum_U.sqrt().unsqueeze(-1) + self.eps)

    def kernel_factors(
        self, state: Mapping[str, Tensor], index_U: Tensor, step: UpdateStep, mean_squares_U: Tensor | None
    ) -> KernelFactors:
        """Returns 1 / (sqrt(s) + eps)."""
        assert mean_squares_U is not None
        sum_U = state["sum"][index_U] + mean_squares_U
        return KernelFactors((1 / (sum_U.sqrt() + self.eps)).unsqueeze(0), {"sum": sum_U})
