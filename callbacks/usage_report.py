"""Slot usage at the end of training: usage.json, and a table on the screen.

What usage.json holds is said by `pkm_lightning.training.usage_figures.report`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
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


def print_report(content: dict[str, Any], console: Console | None = None) -> None:
    """Prints a row a layer and a row a shared table, each figure since the start / of the window."""
    table = Table(title=f"slot usage since the start / in the last {content['window_steps']} steps")
    for column in ("", "slots", *(label for _, label, _ in _COLUMNS), "dead"):
        table.add_column(column, justify="right")
    tables = {name: entry for name, entry in content["tables"].items() if len(entry["layers"]) > 1}
    for name, entry in {**content["layers"], **tables}.items():
        cells = [
            " / ".join(_cell(entry[span][figure], form) for span in ("since_start", "window"))
            for figure, _, form in _COLUMNS
        ]
        table.add_row(name, f"{entry['slots']:,}", *cells, f"{entry['dead']:,}")
    (console or Console()).print(table)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
