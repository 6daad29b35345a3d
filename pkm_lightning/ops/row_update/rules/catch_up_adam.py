"""Adam without momentum, exactly: the decay of the second moment that a row has missed is made up for at its next read.

    v    <- b2**(t - last) v + (1 - b2) g**2
    last <- t
    w    <- w - lr g / (sqrt(v / (1 - b2**t)) + eps)

with t the number of the table's update and `last` that of the row's. Adam (Kingma and Ba 2014, arXiv 1412.6980,
algorithm 1) with b1 = 0 does nothing on a zero gradient but decay v: this is the dense algorithm.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import KernelFactors, RowRule, RowState, UpdateStep

__all__ = ["CatchUpAdam"]


@dataclass(frozen=True, kw_only=True)
class CatchUpAdam(RowRule):
    """Adam with b1 = 0, equal to the dense algorithm.

    Raises:
        ValueError: b1 is not 0.
    """

    name = "catch_up_adam"
    state = {"exp_avg_sq": RowState("value"), "last_step": RowState("row", torch.int32)}  # noqa: RUF012 - read only
    # A row would have to be decayed before it is read, which no update after the read can make up for.
    refuses_decay = "catch_up_adam is the dense algorithm without decay only"
    kernels = ("cpu", "triton")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.betas[0]:
            raise ValueError(
                f"betas={list(self.betas)}: catch_up_adam is exact without momentum only; set the first to 0, or set "
                "table/optimizer=lazy_adam."
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
        """Makes up for the missed decay, updates the second moment and returns the rows after Adam's step."""
        beta2 = self.betas[1]
        _, root_correction2 = self.bias_corrections(step)
        missed_U = (step.number - state["last_step"][index_U]).to(grad_UV.dtype)
        square_UV = state["exp_avg_sq"][index_U] * (beta2**missed_U).unsqueeze(-1) + (1 - beta2) * grad_UV.square()
        state["exp_avg_sq"][index_U], state["last_step"][index_U] = square_UV, step.number
        return rows_UV - step.lr * grad_UV / (square_UV.sqrt() / root_correction2 + self.eps)

    def kernel_factors(
        self, state: Mapping[str, Tensor], index_U: Tensor, step: UpdateStep, mean_squares_U: Tensor | None
    ) -> KernelFactors:
        """Returns the missed decay, b2**(t - last)."""
        last_U = state["last_step"][index_U]
        beta2 = torch.full((1,), self.betas[1], dtype=torch.float32, device=last_U.device)
        decay_U = torch.pow(beta2, step.number - last_U)
        return KernelFactors(decay_U.unsqueeze(0), {"last_step": torch.full_like(last_U, step.number)})
