"""History of revivals: a slot that was revived is left alone for a while, and a rollback undoes its part.

A revival is no read: the counters of reads ignore it. N is here rows, or sub-keys by head and half.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Event(NamedTuple):
    step: int
    clock: int
    name: str
    changed: int


class RevivalHistory:
    """Revivals by name, the same on all ranks; 4 bytes per row or sub-key of a name that had one."""

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._clock_N: dict[str, Tensor] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Rows or sub-keys revived so far, by name."""
        counts = Counter[str]()
        for event in self._events:
            counts[event.name] += event.changed
        return dict(counts)

    def last_change(self, name: str, last_N: Tensor) -> Tensor:
        """Returns the later of last read `last_N` and last revival, in any shape, as steps of the counters' clock."""
        revived_N = self._clock_N.get(name)
        return last_N if revived_N is None else torch.maximum(last_N, revived_N.to(last_N.device))

    def add(self, name: str, is_revived_N: Tensor, *, step: int, clock: int) -> None:
        """Adds revivals at the end of optimizer step `step`, which was step `clock` of the counters' clock."""
        changed = int(is_revived_N.sum())
        if not changed:
            return
        device, before_N = is_revived_N.device, self._clock_N.get(name)
        before_N = torch.zeros_like(is_revived_N, dtype=torch.int32) if before_N is None else before_N.to(device)
        self._clock_N[name] = before_N.masked_fill(is_revived_N, clock)
        self._events.append(_Event(step, clock, name, changed))

    def go_back(self, step: int) -> None:
        """Removes the revivals after the end of `step`, to which training has returned.

        An earlier revival of the same row or sub-key is forgotten too, since only the latest is kept.
        """
        undone = [event.clock for event in self._events if event.step > step]
        if undone:
            self._events = [event for event in self._events if event.step <= step]
            for clock_N in self._clock_N.values():
                # By the clock, which never goes back, since optimizer steps repeat.
                clock_N[clock_N >= min(undone)] = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the history, on the host."""
        # Copies: a rollback changes these tensors in place.
        clocks = {name: clock_N.to("cpu", copy=True) for name, clock_N in self._clock_N.items()}
        return {"events": [tuple(event) for event in self._events], "clocks": clocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the history."""
        self._events = [_Event(*event) for event in state["events"]]
        self._clock_N = dict(state["clocks"])
