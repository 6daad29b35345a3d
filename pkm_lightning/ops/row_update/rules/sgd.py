"""Gradient descent on the rows that were read: w <- w - lr g.

A zero gradient moves nothing, so without weight decay this is the dense algorithm.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import RowRule, UpdateStep

__all__ = ["SGD"]


@dataclass(frozen=True, kw_only=True)
class SGD(RowRule):
    """Plain gradient descent without any state."""

    name = "sgd"
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
        """Returns w - lr g."""
        return rows_UV - step.lr * grad_UV
