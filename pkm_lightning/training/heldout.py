"""The sums of the held-out loss, in fp32 or fp64 whatever dtype the module is cast to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric


class HeldoutSum(SumMetric):
    """A sum over batches and ranks that stays in fp32 in a bf16 module, and that NaN passes through.

    With `trainer.precision=bf16-true` Lightning casts the whole module. torchmetrics (1.9) ignores `.bfloat16()`, but
    not `.to(torch.bfloat16)`, and a sum in bf16 stops growing at 256 times its terms.
    """

    sum_value: Tensor

    def __init__(self) -> None:
        # torchmetrics leaves NaN out by default, and a diverged model must show.
        super().__init__(nan_strategy="disable")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sum; that of torchmetrics is torch's default dtype when the module was last moved."""
        return self.sum_value.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def wide(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved.to(torch.promote_types(moved.dtype, torch.float32)) if moved.is_floating_point() else moved

        return super()._apply(wide, exclude_state)
