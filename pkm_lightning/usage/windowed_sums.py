"""Whole numbers summed over steps: since the start, and over a sliding window. Nothing waits for the device.

The steps are cut into periods of half a window. At step s of period p (from 0) the window holds the whole of period
p - 1 and the part of p up to s: between `half` + 1 and 2 * `half` steps, once so many are done. What a step brings goes
into the period's own sums, and no others: at its end those are added to what was before. Steps never go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class WindowedSums:
    """The sums of one rank, int64.

    Args:
        shape: of a sum.
        half: steps of half a window, 1 or more.
        device: where what is added will be.
        step: steps taken already.

    Attributes:
        now: sums of the period under way, to be added to in place after `turn`.
        first_step: first step that `ever` holds.
    """

    def __init__(self, shape: Sequence[int], *, half: int, device: torch.device, step: int) -> None:
        self.half, self.first_step = half, step + 1
        self._period, self._window_after = step // half, step
        # Of the period, of the one before, and of all that are over.
        self.now, self._before, self._past = (torch.zeros(*shape, dtype=torch.int64, device=device) for _ in range(3))

    def turn(self, step: int) -> None:
        """Begins the period of `step`, if it is another; the sums of the last but one are used again."""
        period = (step - 1) // self.half
        while self._period < period:
            self._past += self.now
            self.now, self._before = self._before, self.now
            self.now.zero_()
            # Of several empty periods only the last two can matter.
            self._period = max(self._period + 1, period - 2)

    def window(self) -> Tensor:
        """Sums of the window."""
        return self.now + self._before

    def ever(self) -> Tensor:
        """Sums since the start."""
        return self.now + self._past

    def window_steps(self, step: int) -> int:
        """Steps that the window holds at the end of `step`, the last that was added to."""
        return step - max((self._period - 1) * self.half, self._window_after)

    # --- what a checkpoint keeps

    def amounts(self) -> Tensor:
        """The period, the one before, and all that are over, (3, *shape): to be summed over the ranks."""
        return torch.stack([self.now, self._before, self._past])

    def state(self, amounts: Tensor) -> dict[str, Any]:
        """What `load` takes, on the host, from sums over the ranks of `amounts`."""
        return {
            "half": self.half,
            "period": self._period,
            "first_step": self.first_step,
            "window_after": self._window_after,
            "amounts": amounts.to("cpu", copy=True),
        }

    def load(self, state: dict[str, Any], *, holds_sums: bool) -> None:
        """Takes up `state`; only one rank holds the sums. A window of another length begins anew."""
        self.first_step = state["first_step"]
        now, before, past = state["amounts"].to(self.now)
        if state["half"] == self.half:
            self._period, self._window_after = state["period"], state["window_after"]
        else:
            past = past + now
            now = before = torch.zeros_like(now)
        if holds_sums:
            for own, saved in ((self.now, now), (self._before, before), (self._past, past)):
                own.copy_(saved)
