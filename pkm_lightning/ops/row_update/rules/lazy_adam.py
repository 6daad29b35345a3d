"""Adam on the rows that were read (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1); others keep their moments.

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g**2
    w <- w - lr m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps)

with t the number of the table's update. This is not the dense algorithm: dense Adam goes on moving a row by its old
momentum, and lets its moments decay, in steps that do not read the row.

With `bias_correction=row`, t is the number of the row's own updates. What a row misses while it is not read is then no
step: each row has exactly the Adam of its own reads, and the first of them is corrected as step 1, whenever it comes.
With the table's number, a row that is first read late moves by (1 - b1) / sqrt(1 - b2) of that, 0.45 with the defaults.
The count of a row has 16 bits and stops at 32,767, where 1 - b**t is 1 in fp32.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.ops.row_update.rules.base import KernelFactors, RowRule, RowState, UpdateStep

__all__ = ["LazyAdam"]


_LAST_COUNT = torch.iinfo(torch.int16).max
_CORRECTIONS = ("table", "row")


@dataclass(frozen=True, kw_only=True)
class LazyAdam(RowRule):
    """Adam whose moments change only when their row is read.

    Args:
        bias_correction: whose updates are counted for the correction of the moments, `table` or `row`.

    Raises:
        ValueError: an unknown `bias_correction`, or one by row with a decay that the count is too short for.
    """

    name = "lazy_adam"
    state = {"exp_avg": RowState("value"), "exp_avg_sq": RowState("value")}  # noqa: RUF012 - read only
    kernels = ("cpu", "triton")

    bias_correction: str = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_correction not in _CORRECTIONS:
            raise ValueError(f"bias_correction={self.bias_correction!r} is not known; allowed: table, row.")
        if self.bias_correction == "table":
            return
        if max(self.betas) ** _LAST_COUNT > 2**-25:
            raise ValueError(
                f"betas={list(self.betas)}: with bias_correction=row each must be at most 0.9994, because the updates "
                f"of a row are counted up to {_LAST_COUNT}; set bias_correction=table."
            )
        # A frozen dataclass sets its fields so as well.
        object.__setattr__(self, "state", {**self.state, "updates": RowState("row", torch.int16)})

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
        correction1: float | Tensor
        root_correction2: float | Tensor
        correction1, root_correction2 = self.bias_corrections(step)
        if self.bias_correction == "row":
            updates_U = self.next_updates(state, index_U)
            state["updates"][index_U] = updates_U
            correction1, root_correction2 = self.row_corrections(updates_U).to(grad_UV.dtype).unsqueeze(-1)
        mean_UV = beta1 * state["exp_avg"][index_U] + (1 - beta1) * grad_UV
        square_UV = beta2 * state["exp_avg_sq"][index_U] + (1 - beta2) * grad_UV.square()
        state["exp_avg"][index_U], state["exp_avg_sq"][index_U] = mean_UV, square_UV
        return rows_UV - step.lr / correction1 * mean_UV / (square_UV.sqrt() / root_correction2 + self.eps)

    def kernel_factors(
        self, state: Mapping[str, Tensor], index_U: Tensor, step: UpdateStep, mean_squares_U: Tensor | None
    ) -> KernelFactors | None:
        """Returns the corrections of both moments where they are counted by row."""
        if self.bias_correction == "table":
            return None
        updates_U = self.next_updates(state, index_U)
        return KernelFactors(self.row_corrections(updates_U), {"updates": updates_U})

    def next_updates(self, state: Mapping[str, Tensor], index_U: Tensor) -> Tensor:
        """Returns the number of this update for each of the rows `index_U`, (U,) int16."""
        return (state["updates"][index_U].int() + 1).clamp(max=_LAST_COUNT).to(torch.int16)

    def row_corrections(self, updates_U: Tensor) -> Tensor:
        """Returns 1 - b1**k and the root of 1 - b2**k for the numbers `updates_U`, (2, U) in fp64.

        fp64, because 1 - b**k loses the digits of b at small k.
        """
        updates_U = updates_U.double()
        beta1, beta2 = self.betas
        return torch.stack([1 - beta1**updates_U, (1 - beta2**updates_U).sqrt()])
