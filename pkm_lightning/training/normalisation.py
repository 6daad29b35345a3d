"""The loss of an optimizer step is the sum of token losses over the number of targets of the whole step.

That is over all ranks and all micro-batches, so that world sizes and accumulations agree. The number is only known
after the last micro-batch: each is scaled by the expectation that the first one gives, and the gradients are corrected
once before clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StepNormaliser:
    """Keeps the targets of the current optimizer step; one object a LightningModule."""

    def __init__(self) -> None:
        self._expected: Tensor | None = None
        self._seen: Tensor | None = None
        self._exact = False

    def scale(self, targets: Tensor, *, world_size: int, accumulate: int) -> Tensor:
        """The factor for this micro-batch's summed loss.

        Args:
            targets: target tokens of this micro-batch over all ranks, a scalar tensor.
            world_size: ranks; the strategy will divide gradients by it.
            accumulate: micro-batches a step; Lightning will divide the loss by it.
        """
        if self._expected is None or self._seen is None:
            self._expected = (targets * accumulate).clamp(min=1).float()
            self._seen = torch.zeros_like(self._expected)
        self._seen = self._seen + targets
        # An epoch may end within a step: then even one micro-batch is not all that was expected.
        self._exact = accumulate == 1
        return world_size * accumulate / self._expected

    def correction(self) -> Tensor | None:
        """What the accumulated gradients must be multiplied by, or None where the expectation was exact."""
        if self._exact or self._expected is None or self._seen is None:
            return None
        return self._expected / self._seen.clamp(min=1)

    def total(self) -> Tensor:
        """Target tokens of the step so far, over all ranks."""
        assert self._seen is not None
        return self._seen

    def reset(self) -> None:
        """Forgets the step that has ended."""
        self.__init__()  # type: ignore[misc]
