"""events.jsonl: a line for each event of a run, kept over kills and resumes.

| key | meaning |
|---|---|
| step | the optimizer step, counted from 1 |
| event | what happened; see `pkm_lightning.callbacks.instability` |
| layer | the layer, or the name of the parameter, that it happened in; null: the whole model |
| figure | what was looked at: loss, grad_norm_dense, grad_norm_table, or a figure of `callbacks.diagnostics` |
| value, threshold | what was found (of a spike its score), and what is allowed; a number, or "nan", "inf", "-inf" |
| action | what its policy says: warn, skip, rollback, stop; the strongest of a step is done |
| returned_to | of a rollback: the step whose state training goes back to |
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One thing that happened in one step; a spike's value is its score."""

    name: str
    step: int
    value: float
    figure: str | None = None
    layer: int | str | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        of = "" if self.figure is None else f" of {self.figure}"
        where = (
            "" if self.layer is None else f" in {f'layer {self.layer}' if isinstance(self.layer, int) else self.layer}"
        )
        allowed = "" if self.threshold is None else f", allowed {self.threshold:.4g}"
        return f"{self.name}{of}{where} in step {self.step} (found {self.value:.4g}{allowed})"


class EventLog:
    """Appends lines; after a resume it goes on behind those that the checkpoint knew of.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0

    def begin(self) -> None:
        """Cuts the file back to `lines`; with none of them it is removed."""
        if not self.path.exists():
            self.lines = 0
            return
        kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[: self.lines]
        self.lines = len(kept)
        if kept:
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text("".join(kept), encoding="utf-8")
            beside.replace(self.path)
        else:
            self.path.unlink()

    def write(self, event: Event, action: str, **more: Any) -> None:
        """One line."""
        line = {"step": event.step, "event": event.name, "layer": event.layer, "figure": event.figure}
        line |= {"value": event.value, "threshold": event.threshold, "action": action, **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _number(value) for key, value in line.items()}) + "\n")
        self.lines += 1


def _number(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
