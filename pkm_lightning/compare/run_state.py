"""How a run directory stands, from its files alone, while its process may be running or be gone."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.storage import hold


@dataclass(frozen=True)
class Progress:
    """The last line of metrics.csv.

    Args:
        step: optimizer steps done.
        loss: of training, nan if the last line has none.
        tokens_per_second: since the start.
    """

    step: int
    loss: float
    tokens_per_second: float


def run_state(folder: Path) -> str:
    """absent (never started), held (a process has it), interrupted (to be continued), failed, or finished."""
    if is_held(folder):
        return "held"
    status = read_record(folder).get("status")
    if status is None:
        return "absent"
    return "interrupted" if status == "running" else str(status)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json, or an empty dict where there is none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_held(folder: Path) -> bool:
    """A process other than this one holds the directory's lock.

    It is taken for a moment: not to be asked of a run that this process is starting.
    """
    try:
        lock = (folder / ".lock").open("r+")
    except OSError:
        return False
    with lock:
        return not hold(lock)


def read_progress(folder: Path) -> Progress | None:
    """Where a run stands; None before its first line."""
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return None
    if not rows:
        return None
    last = rows[-1]
    losses = [row.get("train/loss") for row in rows[-2:] if row.get("train/loss")]
    try:
        seconds = float(last["seconds"])
        return Progress(
            step=int(last["step"]),
            loss=float(losses[-1]) if losses else math.nan,  # type: ignore[arg-type]
            tokens_per_second=int(last["tokens"]) / seconds if seconds else math.nan,
        )
    except (KeyError, TypeError, ValueError):
        return None  # a line that is being written
