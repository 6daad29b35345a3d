"""Integers summed over steps: since the start, and over a sliding window. No method but `load` waits for the device.

The steps are cut into periods of half a window. At step s of period p (from 0) the window holds the whole of period
p - 1 and the part of p up to s: between `half` + 1 and 2 * `half` steps, once that many are done. Every step adds to
the sums of its period only; at the end of a period they are added to the sums before it. Steps never go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class WindowedSums:
    """The sums of one rank, int64.

    Args:
        shape: the shape of a sum.
        half: steps of half a window, 1 or more.
        device: the device of the values to be added.
        step: steps taken before.

    Attributes:
        now: sums of the current period, to be added to in place after `advance`.
        first_step: first step that `ever` holds.
    """

    def __init__(self, shape: Sequence[int], *, half: int, device: torch.device, step: int) -> None:
        self.half, self.first_step = half, step + 1
        self._period, self._window_after = step // half, step
        # Sums of the current period, of the one before, and of all periods that have ended.
        self.now, self._before, self._past = (torch.zeros(*shape, dtype=torch.int64, device=device) for _ in range(3))

    def advance(self, step: int) -> None:
        """Starts the period of `step`, unless it is the current one."""
        period = (step - 1) // self.half
        while self._period < period:
            self._past += self.now
            # The tensor of the last period but one is reused: counters of large tables are too large to allocate anew.
            self.now, self._before = self._before, self.now
            self.now.zero_()
            # After two empty periods the window is empty, so further ones need no loop.
            self._period = max(self._period + 1, period - 2)

    def window(self) -> Tensor:
        """Returns the sums of the window."""
        return self.now + self._before

    def ever(self) -> Tensor:
        """Returns the sums since the start."""
        return self.now + self._past

    def window_steps(self, step: int) -> int:
        """Returns the number of steps that the window holds at the end of `step`, the last one that was added to."""
        return step - max((self._period - 1) * self.half, self._window_after)

    def amounts(self) -> Tensor:
        """Returns the sums of the current period, of the one before, and of all that have ended, (3, *shape)."""
        return torch.stack([self.now, self._before, self._past])

    def state(self, amounts: Tensor) -> dict[str, Any]:
        """Returns the state that `load` restores, on the host, with `amounts` summed over the ranks."""
        return {
            "half": self.half,
            "period": self._period,
            "first_step": self.first_step,
            "window_after": self._window_after,
            # A copy: these tensors change while a checkpoint is written in the background.
            "amounts": amounts.to("cpu", copy=True),
        }

    def load(self, state: dict[str, Any], *, holds_sums: bool) -> None:
        """Restores `state`, with the sums where `holds_sums`; a window of another length starts empty."""
        self.first_step = state["first_step"]
        now, before, past = state["amounts"].to(self.now)
        if state["half"] == self.half:
            self._period, self._window_after = state["period"], state["window_after"]
        else:
            past = past + now
            now = before = torch.zeros_like(now)
        # The saved sums are over all ranks, so only one rank may continue from them.
        if holds_sums:
            for current, saved in ((self.now, now), (self._before, before), (self._past, past)):
                current.copy_(saved)
