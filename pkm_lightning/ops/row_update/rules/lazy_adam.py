"""Adam on the rows that were read (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1); others keep their moments.

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g**2
    w <- w - lr m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps)

with t the number of the table's update. This is not the dense algorithm: dense Adam goes on moving a row by its old
momentum, and lets its moments decay, in steps that do not read the row.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import RowRule, RowState, UpdateStep

__all__ = ["LazyAdam"]


@dataclass(frozen=True, kw_only=True)
class LazyAdam(RowRule):
    """Adam whose moments change only when their row is read."""

    name = "lazy_adam"
    state = {"exp_avg": RowState("value"), "exp_avg_sq": RowState("value")}  # noqa: RUF012 - read only
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
        """Updates both moments of the rows and returns the rows after Adam's step."""
        beta1, beta2 = self.betas
        correction1, root_correction2 = self.bias_corrections(step)
        mean_UV = beta1 * state["exp_avg"][index_U] + (1 - beta1) * grad_UV
        square_UV = beta2 * state["exp_avg_sq"][index_U] + (1 - beta2) * grad_UV.square()
        state["exp_avg"][index_U], state["exp_avg_sq"][index_U] = mean_UV, square_UV
        return rows_UV - step.lr / correction1 * mean_UV / (square_UV.sqrt() / root_correction2 + self.eps)
