"""Slot usage at the end of training: usage.json, and a table on the screen.

`pkm_lightning.usage.figures.report` describes the content of usage.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich import box, get_console
from rich.table import Table
from rich.text import Text

from pkm_lightning.errors import counted
from pkm_lightning.storage import write_beside
from pkm_lightning.usage.counters import UsageCounters
from pkm_lightning.usage.figures import report

#: Figure, column, and format.
_COLUMNS = (
    ("used_percent", "used %", ".1f"),
    ("kl_count", "KL reads", ".3f"),
    ("kl_weight", "KL weight", ".3f"),
    ("top90", "hold 90% of reads", ",.0f"),
)


def save_report(trainer: L.Trainer, counters: UsageCounters, dead_after: int, path: Path, *, show: bool) -> None:
    """Writes usage.json on the first rank, and prints it if asked. Collective: call on all ranks."""
    content = report(counters, trainer.global_step, dead_after)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        if show:
            _print(content)


def _print(content: dict[str, Any]) -> None:
    """Prints one row per layer and shared table, and a second one of the window where it is not the whole run."""
    table = Table(title="slot usage", box=box.SIMPLE_HEAD)
    table.add_column("reads of", no_wrap=True)
    for column in ("slots", *(label for _, label, _ in _COLUMNS), "dead"):
        table.add_column(column, justify="right")
    steps = content["window_steps"]
    is_whole = steps == content["clock"] - content["first_step"] + 1
    tables = {name: entry for name, entry in content["tables"].items() if len(entry["layers"]) > 1}
    for name, entry in {**content["layers"], **tables}.items():
        table.add_row(Text(name), f"{entry['slots']:,}", *_cells(entry["since_start"]), f"{entry['dead']:,}")
        if not is_whole:
            table.add_row(f"  last {counted(steps, 'step')}", "", *_cells(entry["window"]), "")
    # The console of the progress bar, so that neither overwrites the other.
    get_console().print(table)


def _cells(figures: dict[str, float | None]) -> list[str]:
    values = [(figures[figure], form) for figure, _, form in _COLUMNS]
    return ["-" if value is None else format(value, form) for value, form in values]
