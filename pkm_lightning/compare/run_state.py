"""The state of a run directory, read from its files while its process may be running or gone."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.storage import hold, open_regular


@dataclass(frozen=True)
class Progress:
    """The last line of metrics.csv.

    Args:
        step: optimizer steps that are done.
        loss: training loss, nan if the last two lines have none.
        seconds: of training so far.
        tokens_per_second: mean since the start.
    """

    step: int
    loss: float
    seconds: float
    tokens_per_second: float


def run_state(folder: Path) -> str:
    """Returns `absent` (never started), `held` (by a process), `interrupted` (resumable), `failed` or `finished`."""
    if is_held(folder):
        return "held"
    status = read_record(folder).get("status")
    if status is None:
        return "absent"
    # Without a lock nobody runs it: its process was killed before it could write another status.
    return "interrupted" if status == "running" else str(status)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads run.json; returns an empty dict where there is no readable one."""
    try:
        with open_regular(folder / "run.json", encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def is_held(folder: Path) -> bool:
    """Returns whether another process holds the directory's lock.

    The test takes the lock for a moment: never call it for a run that this process is starting.
    """
    try:
        lock = open_regular(folder / ".lock", "r+")
    except OSError:
        return False
    with lock:
        return not hold(lock)


def read_progress(folder: Path) -> Progress | None:
    """Reads the progress of a run; returns None before its first line of metrics."""
    try:
        with open_regular(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return None
    if not rows:
        return None
    last = rows[-1]
    # A validation writes a line of its own after the one with the training loss.
    losses = [row.get("train/loss") for row in rows[-2:] if row.get("train/loss")]
    try:
        seconds = float(last["seconds"])
        return Progress(
            step=int(last["step"]),
            loss=float(losses[-1]) if losses else math.nan,  # type: ignore[arg-type]
            seconds=seconds,
            tokens_per_second=int(last["tokens"]) / seconds if seconds else math.nan,
        )
    except (KeyError, TypeError, ValueError):
        return None  # the line is being written
