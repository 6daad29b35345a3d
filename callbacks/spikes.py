"""Spikes: robust z-scores of a few series over their last steps, computed on the device.

Letters: K series, W steps of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Scales the median absolute deviation to the standard deviation of a normal distribution.
_NORMAL = 1.4826


class SpikeWindow:
    """A window over the last values of K series. No method waits for the device.

    The score of a value is `(value - median) / max(1.4826 * MAD, relative_floor * |median|, floor)`, with the median
    and MAD (median absolute deviation) of the window before it. Outliers affect neither while they are fewer than half.

    Args:
        floors, relative_floors: the smallest deviation that counts per series, absolute and relative to the median, K
            each; without them a series that hardly moves would spike at every small change.
        window: steps W, 1 or more.
        warm_up: values of a series before which its score is 0.
        device: the device of the values.
    """

    def __init__(
        self,
        *,
        floors: Sequence[float],
        relative_floors: Sequence[float],
        window: int,
        warm_up: int,
        device: torch.device,
    ) -> None:
        self.warm_up = warm_up
        self._floor_K, self._relative_K = (
            torch.tensor(numbers, dtype=torch.float64, device=device) for numbers in (floors, relative_floors)
        )
        self._values_KW = torch.full((len(floors), window), float("nan"), dtype=torch.float64, device=device)
        self._count_K = torch.zeros(len(floors), dtype=torch.int64, device=device)

    def scores(self, values_K: Tensor) -> Tensor:
        """Returns the score of each value, (K,); NaN for values that are not finite."""
        median_K = self._values_KW.nanmedian(dim=1).values
        spread_K = (self._values_KW - median_K.unsqueeze(1)).abs().nanmedian(dim=1).values
        floor_K = torch.maximum(self._relative_K * median_K.abs(), self._floor_K)
        # Without a floor, a window of equal values would divide by 0.
        scale_K = torch.maximum(_NORMAL * spread_K, floor_K).clamp(min=1e-12)
        scores_K = (values_K.to(scale_K) - median_K) / scale_K
        return torch.where((self._count_K >= self.warm_up) & ~median_K.isnan(), scores_K, torch.zeros_like(scores_K))

    def add(self, values_K: Tensor) -> None:
        """Adds the values of a step, except those that are not finite."""
        values_K = values_K.to(self._values_KW)
        finite_K = values_K.isfinite()
        # Each series has a ring buffer of its own; `where`, unlike an index by a mask, does not wait for the device.
        position_K1 = (self._count_K % self._values_KW.shape[1]).unsqueeze(1)
        written_K1 = torch.where(finite_K.unsqueeze(1), values_K.unsqueeze(1), self._values_KW.gather(1, position_K1))
        self._values_KW.scatter_(1, position_K1, written_K1)
        self._count_K += finite_K

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the values, and the number of values so far per series."""
        return {"values": self._values_KW, "count": self._count_K}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state` if it has the same number of series and steps; otherwise the window stays empty."""
        if state["values"].shape == self._values_KW.shape:
            self._values_KW.copy_(state["values"])
            self._count_K.copy_(state["count"])
