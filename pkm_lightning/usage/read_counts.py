"""Number, weight and last step of the reads of each of N slots: since the start, and over a sliding window.

Letters: M = N + 1 counters, C reads per token over all heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.ops.count_reads import WEIGHT_UNIT, count_reads
from pkm_lightning.usage.windowed_sums import WindowedSums


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


#: Number and weight of the current period, of the one before and of all that have ended, and the last step of a read.
BYTES_PER_SLOT = 3 * 2 * 8 + 4


class ReadCounts:
    """The counters of one rank, on `device`, `BYTES_PER_SLOT` each. No method but `state` waits for the device.

    Args:
        n_slots: slots N.
        half: steps of half a window, 1 or more; see `WindowedSums`.
        device: the device of the ids.
        step: steps taken before; no slot counts as dead for them.

    Attributes:
        last_N: last step that read a slot, (N,) int32; `step` where none did.
        first_step: first step that `ever` holds.
    """

    def __init__(self, n_slots: int, *, half: int, device: torch.device, step: int = 0) -> None:
        self.n_slots = n_slots
        # The last counter, of all three kinds, is for ids out of range; see `count_reads`.
        self._sums = WindowedSums((2, n_slots + 1), half=half, device=device, step=step)
        self._last_M = torch.full((n_slots + 1,), step, dtype=torch.int32, device=device)

    @property
    def last_N(self) -> Tensor:
        """Last step that read a slot."""
        return self._last_M[:-1]

    @property
    def first_step(self) -> int:
        """First step that `ever` holds."""
        return self._sums.first_step

    def add(self, ids_TC: Tensor, weights_TC: Tensor, valid_T: Tensor | None, step: int) -> None:
        """Counts the reads of a micro-batch of `step`; see `pkm_lightning.ops.count_reads`."""
        self.advance(step)
        counts_M, units_M = self._sums.now
        count_reads(counts_M, units_M, self._last_M, ids_TC, weights_TC, valid_T, step)

    def advance(self, step: int) -> None:
        """Starts the period of `step`, unless it is the current one."""
        self._sums.advance(step)

    def window(self) -> Counted:
        """Returns the reads of the window on this rank."""
        return Counted(*self._sums.window()[:, :-1])

    def ever(self) -> Counted:
        """Returns the reads since the start on this rank."""
        return Counted(*self._sums.ever()[:, :-1])

    def window_steps(self, step: int) -> int:
        """Returns the number of steps that the window holds at the end of `step`, the last one counted."""
        return self._sums.window_steps(step)

    def amounts(self) -> Tensor:
        """Returns number and weight by period, (3, 2, N), to be summed over the ranks; see `WindowedSums.amounts`."""
        return self._sums.amounts()[..., :-1]

    def state(self, amounts_32N: Tensor, last_N: Tensor) -> dict[str, Any]:
        """Returns the state that `load` restores, on the host.

        Args:
            amounts_32N: the sum of `amounts` over the ranks.
            last_N: the maximum of `last_N` over the ranks.
        """
        return {**self._sums.state(amounts_32N), "last": last_N.to("cpu", copy=True)}

    def load(self, state: dict[str, Any], *, holds_sums: bool) -> None:
        """Restores `state`; see `WindowedSums.load`."""
        self._last_M[:-1] = state["last"].to(self._last_M)
        self._sums.load({**state, "amounts": functional.pad(state["amounts"], (0, 1))}, holds_sums=holds_sums)
