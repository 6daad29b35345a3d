"""How often, how strongly and when each of N slots was read: since the start, and over a sliding window.

The steps are cut into periods of half a window. At step s of period p (from 0) the window holds the whole of period
p - 1 and the part of p up to s: between `half` + 1 and 2 * `half` steps, once so many are done. A step's reads go into
the period's own counters, and no others: at its end those are added to what was before. Steps never go back.

Letters: N slots, M = N + 1 counters, T tokens, C reads a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.ops.count_reads import WEIGHT_UNIT, count_reads


class Counted(NamedTuple):
    """Reads over some steps."""

    #: Reads of each slot, (N,) int64.
    counts_N: Tensor
    #: Sum of their |weight| in units of 2**-24, (N,) int64.
    units_N: Tensor

    @property
    def weights_N(self) -> Tensor:
        """Sum of |weight| of each slot, (N,) fp64."""
        return self.units_N.double() * WEIGHT_UNIT


class ReadCounts:
    """The counters of one rank, on `device`, 52 bytes a slot. No method but `state_dict` waits for the device.

    Args:
        n_slots: slots N.
        half: steps of half a window, 1 or more.
        device: where the ids will be.
        step: steps taken already; no slot counts as dead for them.

    Attributes:
        last_N: last step that read a slot, (N,) int32; `step` where none did.
        first_step: first step that `ever` holds.
    """

    def __init__(self, n_slots: int, *, half: int, device: torch.device, step: int = 0) -> None:
        self.n_slots, self.half, self.first_step = n_slots, half, step + 1
        self._period, self._window_after = step // half, step
        # Count and weight of the period, of the one before, and of all that are over.
        self._now, self._before, self._past = (
            torch.zeros(2, n_slots + 1, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._last_M = torch.full((n_slots + 1,), step, dtype=torch.int32, device=device)

    @property
    def last_N(self) -> Tensor:
        """Last step that read a slot."""
        return self._last_M[:-1]

    def add(self, ids_TC: Tensor, weights_TC: Tensor, valid_T: Tensor | None, step: int) -> None:
        """Counts the reads of a micro-batch of `step`; see `pkm_lightning.ops.count_reads`."""
        self.turn(step)
        count_reads(self._now[0], self._now[1], self._last_M, ids_TC, weights_TC, valid_T, step)

    def turn(self, step: int) -> None:
        """Begins the period of `step`, if it is another; the counters of the last but one are used again."""
        period = (step - 1) // self.half
        while self._period < period:
            self._past += self._now
            self._now, self._before = self._before, self._now
            self._now.zero_()
            # Of several empty periods only the last two can matter.
            self._period = max(self._period + 1, period - 2)

    def window(self) -> Counted:
        """Reads of the window on this rank."""
        return Counted(*(self._now + self._before)[:, :-1])

    def ever(self) -> Counted:
        """Reads since the start on this rank."""
        return Counted(*(self._now + self._past)[:, :-1])

    def window_steps(self, step: int) -> int:
        """Steps that the window holds at the end of `step`, the last that was counted."""
        return step - max((self._period - 1) * self.half, self._window_after)

    # --- what a checkpoint keeps

    def amounts(self) -> Tensor:
        """Count and weight of the period, of the one before, and of all that are over, (3, 2, N): to be summed."""
        return torch.stack([self._now, self._before, self._past])[..., :-1]

    def state(self, amounts_32N: Tensor, last_N: Tensor) -> dict[str, Any]:
        """What `load` takes, on the host, from sums over the ranks of `amounts` and the latest of their `last_N`."""
        return {
            "half": self.half,
            "period": self._period,
            "first_step": self.first_step,
            "window_after": self._window_after,
            "amounts": amounts_32N.to("cpu", copy=True),
            "last": last_N.to("cpu", copy=True),
        }

    def load(self, state: dict[str, Any], *, holds_sums: bool) -> None:
        """Takes up `state`; only one rank holds the sums. A window of another length begins anew."""
        self.first_step = state["first_step"]
        self._last_M[:-1] = state["last"].to(self._last_M)
        now_2N, before_2N, past_2N = state["amounts"].to(self._now)
        if state["half"] == self.half:
            self._period, self._window_after = state["period"], state["window_after"]
        else:
            past_2N = past_2N + now_2N
            now_2N = before_2N = torch.zeros_like(now_2N)
        if holds_sums:
            for counters_2M, saved_2N in ((self._now, now_2N), (self._before, before_2N), (self._past, past_2N)):
                counters_2M[:, :-1] = saved_2N
