"""From the loss and the gradient norms of a step to its events: what is not finite, what is a spike.

Letters: K series.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.callbacks.spikes import SpikeWindow

#: The figures that are watched; see `pkm_lightning.training.step_watch.StepWatch`.
SERIES = ("loss", "grad_norm_dense", "grad_norm_table")
STEP_EVENTS = ("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike")


class StepEvent(NamedTuple):
    """One thing that happened in one step; a spike's value is its score, and only spikes have a threshold."""

    name: str
    step: int
    figure: str
    value: float
    threshold: float | None


class StepEvents:
    """Keeps the figures of steps on the device until somebody reads them.

    Args:
        spikes: the window of the series.
        threshold: score from which on a value is a spike.
        scaled_gradients: losses are scaled for fp16: gradients that are not finite are then met every now and then,
            and their steps left out, by the scaler itself.
    """

    def __init__(self, spikes: SpikeWindow, threshold: float, *, scaled_gradients: bool) -> None:
        self.spikes, self.threshold, self.scaled_gradients = spikes, threshold, scaled_gradients
        self._unread: list[tuple[int, Tensor]] = []
        self._events_read: list[StepEvent] = []
        self._seen_K: Tensor | None = None

    def take(self, step: int, figures: dict[str, Tensor], *, wait: bool) -> list[StepEvent]:
        """Notes a step that is about to be made; its events, the same on all ranks, if it is worth to `wait` for them.

        Args:
            step: counted from 1.
            figures: scalars by name; of the series some may be missing.
            wait: read them now. Without, the host goes on, and `drain` tells the events later.
        """
        loss = figures["loss"].detach().double()
        values_K = torch.stack([figures.get(name, loss.new_ones(())).detach().to(loss) for name in SERIES])
        # Norms of gradients vary by factors.
        self._seen_K = torch.cat([values_K[:1], values_K[1:].clamp(min=1e-30).log()])
        found_2K = torch.stack([values_K, self.spikes.scores(self._seen_K)])
        if wait and dist.is_available() and dist.is_initialized():
            dist.broadcast(found_2K, src=0)
        if not wait:
            self._unread.append((step, found_2K))
            return []
        events = self._events(step, found_2K.tolist())
        self._events_read += events
        return events

    def made(self) -> None:
        """The step that was taken last is made: later ones are compared with it."""
        assert self._seen_K is not None
        self.spikes.add(self._seen_K)

    def drain(self) -> list[StepEvent]:
        """The events of all steps since the last call; waits for the device."""
        events, unread = self._events_read, self._unread
        self._events_read, self._unread = [], []
        if unread:
            found = torch.stack([found_2K for _, found_2K in unread]).tolist()
            for (step, _), of_step in zip(unread, found, strict=True):
                events += self._events(step, of_step)
        return events

    def _events(self, step: int, found_2K: list[list[float]]) -> list[StepEvent]:
        events = []
        for series, value, score in zip(SERIES, *found_2K, strict=True):
            kind = "loss" if series == "loss" else "gradient"
            if not math.isfinite(value):
                if kind == "loss" or not self.scaled_gradients:
                    events.append(StepEvent(f"{kind}_not_finite", step, series, value, None))
            elif score > self.threshold:
                events.append(StepEvent(f"{kind}_spike", step, series, score, self.threshold))
        return events
