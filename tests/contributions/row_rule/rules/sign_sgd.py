"""Sign descent with a rate that falls with the reads of a row (Bernstein et al. 2018, arXiv 1802.04434, algorithm 1).

    n <- n + 1
    w <- w - lr n**-power sign(g)

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import RowRule, RowState, UpdateStep

__all__ = ["SignSGD"]


@dataclass(frozen=True, kw_only=True)
class SignSGD(RowRule):
    """Sign descent; `power`, at least 0, is the speed at which the rate of a row falls.

    Raises:
        ValueError: `power` is below 0.
    """

    name = "sign_sgd"
    state = {"reads": RowState("row", torch.int32)}  # noqa: RUF012 - read only

    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 0:
            raise ValueError(f"power={self.power} must be at least 0.")

    def update(
        self,
        rows_UV: Tensor,
        grad_UV: Tensor,
        state: Mapping[str, Tensor],
        index_U: Tensor,
        step: UpdateStep,
        mean_squares_U: Tensor | None,
    ) -> Tensor:
        """Counts one more read of each row and returns the rows moved against the sign of their gradient."""
        reads_U = state["reads"][index_U] + 1
        state["reads"][index_U] = reads_U
        rate_U = step.lr * reads_U.to(rows_UV.dtype) ** -self.power
        return rows_UV - rate_U.unsqueeze(-1) * grad_UV.sign()
