"""The events of a step, which follow from its loss and gradient norms, and the policies that answer events.

Letters: K series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.callbacks.event_log import Event
from pkm_lightning.callbacks.spikes import SpikeWindow
from pkm_lightning.errors import ConfigError, check_choice
from pkm_lightning.ops.ranks import is_distributed

#: The figures that are watched; see `pkm_lightning.training.step.StepWatch`.
SERIES = ("loss", "grad_norm_dense", "grad_norm_table")
#: The smallest deviation that counts: of the loss relative to its median, of the logarithm of a norm absolute.
RELATIVE_FLOORS, FLOORS = (0.01, 0.0, 0.0), (0.0, 0.01, 0.01)
STEP_EVENTS = ("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike")
EVENTS = (*STEP_EVENTS, "weight_not_finite", "limit")
#: From the weakest to the strongest answer.
POLICIES = ("warn", "skip", "rollback", "stop")


class StepEvents:
    """The figures of the last steps, on the device until their events are read.

    Args:
        window, warm_up, device: as of `SpikeWindow`.
        threshold: score above which a value is a spike.
        scaled_gradients: losses are scaled for fp16, so that gradients that are not finite are expected now and then;
            the scaler leaves out their steps itself.
    """

    def __init__(
        self, *, window: int, warm_up: int, threshold: float, scaled_gradients: bool, device: torch.device
    ) -> None:
        self.spikes = SpikeWindow(
            floors=FLOORS, relative_floors=RELATIVE_FLOORS, window=window, warm_up=warm_up, device=device
        )
        self.threshold, self.scaled_gradients = threshold, scaled_gradients
        self._unread: list[tuple[int, Tensor]] = []
        self._events_read: list[Event] = []

    def add(self, step: int, figures: dict[str, Tensor], *, wait: bool) -> list[Event]:
        """Adds the step that is about to be made, and returns its events, the same on all ranks.

        Args:
            step: counted from 1.
            figures: scalars by name; some of the series may be missing.
            wait: read the events now, which waits for the device; without it the list is empty and `drain` returns
                the events later.
        """
        loss = figures["loss"].detach().double()
        values_K = torch.stack([figures.get(name, loss.new_ones(())).detach().to(loss) for name in SERIES])
        # Norms of gradients vary by factors, so their logarithms are compared.
        levels_K = torch.cat([values_K[:1], values_K[1:].clamp(min=1e-30).log()])
        scored_2K = torch.stack([values_K, self.spikes.scores(levels_K)])
        # Refused steps enter the window too; otherwise a lasting change of level would be refused for ever.
        self.spikes.add(levels_K)
        # Ranks may round differently, and all must take the same decision.
        if wait and is_distributed():
            dist.broadcast(scored_2K, src=0)
        if not wait:
            self._unread.append((step, scored_2K))
            return []
        events = self._events(step, scored_2K.tolist())
        self._events_read += events
        return events

    def drain(self) -> list[Event]:
        """Returns the events of all steps since the last call; waits for the device."""
        events, unread = self._events_read, self._unread
        self._events_read, self._unread = [], []
        if unread:
            # One copy to the host for all steps.
            scored = torch.stack([scored_2K for _, scored_2K in unread]).tolist()
            for (step, _), scored_2K in zip(unread, scored, strict=True):
                events += self._events(step, scored_2K)
        return events

    def _events(self, step: int, scored_2K: list[list[float]]) -> list[Event]:
        events = []
        for series, value, score in zip(SERIES, *scored_2K, strict=True):
            kind = "loss" if series == "loss" else "gradient"
            if not math.isfinite(value):
                if kind == "loss" or not self.scaled_gradients:
                    events.append(Event(f"{kind}_not_finite", step, value, figure=series))
            elif score > self.threshold:
                events.append(Event(f"{kind}_spike", step, score, figure=series, threshold=self.threshold))
        return events


def check_mapping(name: str, value: object) -> None:
    """Refuses a `value` of `callbacks.instability.NAME` that is not a mapping.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"callbacks.instability.{name}={value} is not a mapping; write {name}: {{NAME: VALUE}}.")


def policies_by_event(policies: Mapping[str, str | None]) -> dict[str, str]:
    """Returns a policy for every event, from those that are configured; see `Instability`.

    Raises:
        ConfigError: an unknown event, or a policy that is unknown or makes no sense for its event.
    """
    check_mapping("policies", policies)
    chosen = {event: policy for event, policy in policies.items() if policy is not None}
    for event in policies:
        check_choice("callbacks.instability.policies: event", event, EVENTS)
    for event, policy in chosen.items():
        allowed = POLICIES if event in STEP_EVENTS else tuple(p for p in POLICIES if p != "skip")
        check_choice(f"callbacks.instability.policies.{event}", policy, allowed)
    complete = dict.fromkeys(EVENTS, "warn") | chosen
    if "weight_not_finite" not in chosen:
        # With broken weights every later step fails, so skipping steps would be of no use.
        complete["weight_not_finite"] = {"skip": "stop"}.get(complete["loss_not_finite"], complete["loss_not_finite"])
    return complete


class Retries:
    """Counters of refused steps in a row, and of rollbacks that did not get beyond the step that failed.

    Args:
        limit: the largest number of either.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._skips = self._rollbacks = self._furthest = 0

    def allow(self, answer: str, step: int) -> bool:
        """Counts a `skip` or `rollback` because `step` has failed, and returns whether it is within the limit."""
        if answer == "skip":
            self._skips += 1
            return self._skips <= self.limit
        self._rollbacks = 1 if step > self._furthest else self._rollbacks + 1
        self._furthest = max(self._furthest, step)
        return self._rollbacks <= self.limit

    def register_success(self, step: int) -> None:
        """Registers that `step` was made without an event."""
        self._skips = 0
        if step > self._furthest:
            self._rollbacks = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the counts."""
        return {"skips": self._skips, "rollbacks": self._rollbacks, "furthest": self._furthest}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the counts."""
        self._skips, self._rollbacks, self._furthest = state["skips"], state["rollbacks"], state["furthest"]
