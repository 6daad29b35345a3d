"""Slot usage at the end of training: usage.json, and a table on the screen.

What usage.json holds is said by `pkm_lightning.usage.figures.report`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich import box, get_console
from rich.table import Table

from pkm_lightning.storage import flush

#: Figure, column, and format.
_COLUMNS = (
    ("used_percent", "used %", ".1f"),
    ("kl_count", "KL reads", ".3f"),
    ("kl_weight", "KL weight", ".3f"),
    ("top90", "hold 90% of reads", ",.0f"),
)


def write_report(content: dict[str, Any], path: Path) -> None:
    """Writes usage.json beside and renames it, so that there never is half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    flush(beside)
    os.replace(beside, path)


def print_report(content: dict[str, Any]) -> None:
    """Prints a row a layer and a row a shared table; below it that of the window, where it is not the whole run."""
    table = Table(title="slot usage", box=box.SIMPLE_HEAD)
    table.add_column("reads of", no_wrap=True)
    for column in ("slots", *(label for _, label, _ in _COLUMNS), "dead"):
        table.add_column(column, justify="right")
    steps = content["window_steps"]
    is_whole = steps == content["clock"] - content["first_step"] + 1
    tables = {name: entry for name, entry in content["tables"].items() if len(entry["layers"]) > 1}
    for name, entry in {**content["layers"], **tables}.items():
        table.add_row(name, f"{entry['slots']:,}", *_cells(entry["since_start"]), f"{entry['dead']:,}")
        if not is_whole:
            table.add_row(f"  last {steps:,} steps", "", *_cells(entry["window"]), "")
    get_console().print(table)  # the progress bar's as well, so that neither writes over the other


def _cells(figures: dict[str, float | None]) -> list[str]:
    found = [(figures[figure], form) for figure, _, form in _COLUMNS]
    return ["-" if value is None else format(value, form) for value, form in found]
