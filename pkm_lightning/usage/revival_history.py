"""What was revived when: what has just got another start waits for readers, and a rollback takes its share back.

A revival is no read: counters of reads do not know of it. Letters: N rows, or sub-keys by head and half.
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
    """Revivals by name, the same on all ranks; 4 bytes for each row or sub-key of a name that had one."""

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

    def since(self, name: str, last_N: Tensor) -> Tensor:
        """The later of last read and last revival, of any shape, in steps of the clock of `UsageCounters`."""
        revived_N = self._clock_N.get(name)
        return last_N if revived_N is None else torch.maximum(last_N, revived_N.to(last_N.device))

    def note(self, name: str, which_N: Tensor, *, step: int, clock: int) -> None:
        """Those of `which` (bool) were revived at the end of optimizer step `step`, watched as step `clock`."""
        changed = int(which_N.sum())
        if not changed:
            return
        before_N = self._clock_N.get(name)
        before_N = torch.zeros_like(which_N, dtype=torch.int32) if before_N is None else before_N.to(which_N.device)
        self._clock_N[name] = before_N.masked_fill(which_N, clock)
        self._events.append(_Event(step, clock, name, changed))

    def go_back(self, step: int) -> None:
        """Training has returned to the end of `step`: what was revived later is as it was before.

        Of an earlier revival of the same row or sub-key nothing is known any more.
        """
        undone = [event.clock for event in self._events if event.step > step]
        if undone:
            self._events = [event for event in self._events if event.step <= step]
            for clock_N in self._clock_N.values():
                clock_N[clock_N >= min(undone)] = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, on the host."""
        clocks = {name: clock_N.to("cpu", copy=True) for name, clock_N in self._clock_N.items()}
        return {"events": [tuple(event) for event in self._events], "clocks": clocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was asked."""
        self._events = [_Event(*event) for event in state["events"]]
        self._clock_N = dict(state["clocks"])
