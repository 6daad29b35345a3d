"""From the loss and the gradient norms of a step to its events: what is not finite, what is a spike.

Letters: K series.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.callbacks.event_log import Event
from pkm_lightning.callbacks.spikes import SpikeWindow

#: The figures that are watched; see `pkm_lightning.training.step.StepWatch`.
SERIES = ("loss", "grad_norm_dense", "grad_norm_table")
#: Least deviation of each that counts: of the loss in parts of its median, of the logarithms of norms by itself.
RELATIVE_FLOORS, FLOORS = (0.01, 0.0, 0.0), (0.0, 0.01, 0.01)
STEP_EVENTS = ("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike")


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
        self._events_read: list[Event] = []

    def take(self, step: int, figures: dict[str, Tensor], *, wait: bool) -> list[Event]:
        """Notes a step that is about to be made; its events, the same on all ranks, if it is worth to `wait` for them.

        Args:
            step: counted from 1.
            figures: scalars by name; of the series some may be missing.
            wait: read them now. Without, the host goes on, and `drain` tells the events later.
        """
        loss = figures["loss"].detach().double()
        values_K = torch.stack([figures.get(name, loss.new_ones(())).detach().to(loss) for name in SERIES])
        # Norms of gradients vary by factors.
        seen_K = torch.cat([values_K[:1], values_K[1:].clamp(min=1e-30).log()])
        found_2K = torch.stack([values_K, self.spikes.scores(seen_K)])
        # Of refused steps too: else a lasting change of level would be refused for ever.
        self.spikes.add(seen_K)
        if wait and dist.is_available() and dist.is_initialized():
            dist.broadcast(found_2K, src=0)
        if not wait:
            self._unread.append((step, found_2K))
            return []
        events = self._events(step, found_2K.tolist())
        self._events_read += events
        return events

    def drain(self) -> list[Event]:
        """The events of all steps since the last call; waits for the device."""
        events, unread = self._events_read, self._unread
        self._events_read, self._unread = [], []
        if unread:
            found = torch.stack([found_2K for _, found_2K in unread]).tolist()
            for (step, _), of_step in zip(unread, found, strict=True):
                events += self._events(step, of_step)
        return events

    def _events(self, step: int, found_2K: list[list[float]]) -> list[Event]:
        events = []
        for series, value, score in zip(SERIES, *found_2K, strict=True):
            kind = "loss" if series == "loss" else "gradient"
            if not math.isfinite(value):
                if kind == "loss" or not self.scaled_gradients:
                    events.append(Event(f"{kind}_not_finite", step, value, figure=series))
            elif score > self.threshold:
                events.append(Event(f"{kind}_spike", step, score, figure=series, threshold=self.threshold))
        return events
