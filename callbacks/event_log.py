"""events.jsonl: one line per event of a run, kept over kills and resumes.

| key | meaning |
|---|---|
| step | the optimizer step, counted from 1 |
| event | what happened; see `pkm_lightning.callbacks.instability` |
| layer | the layer, or the name of the parameter, where it happened; null: the whole model |
| figure | the quantity: loss, grad_norm_dense, grad_norm_table, or a figure of `callbacks.diagnostics` |
| value, threshold | the value (of a spike its score) and the largest allowed one; a number, "nan", "inf" or "-inf" |
| action | the policy of the event: warn, skip, rollback, stop; the strongest one of a step is carried out |
| returned_to | only with action rollback: the step whose state training goes back to |
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from pkm_lightning.storage import flush, write_beside

_log = logging.getLogger(__name__)
_SHOW_EVERY = 100


class Event(NamedTuple):
    """An event of one step; the value of a spike is its score."""

    name: str
    step: int
    value: float
    figure: str | None = None
    layer: int | str | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        figure = "" if self.figure is None else f" of {self.figure}"
        layer = f"layer {self.layer}" if isinstance(self.layer, int) else self.layer
        place = "" if layer is None else f" in {layer}"
        allowed = "" if self.threshold is None else f", allowed {self.threshold:.4g}"
        return f"{self.name}{figure}{place} in step {self.step} (found {self.value:.4g}{allowed})"


class EventLog:
    """The file of events and its echo on the screen; after a resume it continues behind the lines of the checkpoint.

    Args:
        path: the file.

    Attributes:
        lines: lines of the file that belong to this run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0
        self._last_shown: dict[str, int] = {}

    def begin(self) -> None:
        """Cuts the file to `lines` lines, and removes it if that leaves none."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        remaining = text.splitlines(keepends=True)[: self.lines]
        if len(remaining) < self.lines:
            _log.warning("%s has %d of the %d events before the checkpoint", self.path, len(remaining), self.lines)
        self.lines = len(remaining)
        if remaining:
            write_beside(self.path, "".join(remaining))
        else:
            self.path.unlink(missing_ok=True)

    def lines_on_disk(self) -> int:
        """Returns the number of lines for a checkpoint, and waits until they would survive a loss of power."""
        if self.path.exists():
            flush(self.path)
        return self.lines

    def write(self, event: Event, action: str, **more: Any) -> None:
        """Appends one line to the file, and shows it; of events that are only warned of, one per 100 steps."""
        line = {"step": event.step, "event": event.name, "layer": event.layer, "figure": event.figure}
        line |= {"value": event.value, "threshold": event.threshold, "action": action, **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _number(value) for key, value in line.items()}) + "\n")
        self.lines += 1
        # A run that stays broken would fill the screen.
        if action != "warn" or event.step - self._last_shown.get(event.name, -_SHOW_EVERY) >= _SHOW_EVERY:
            self._last_shown[event.name] = event.step
            _log.warning("%s: %s", event, action)


def _number(value: Any) -> Any:
    # JSON has no number for NaN and infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
