"""What `edit` prints: its result, a table of edits, and all of one edit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pkm_lightning.checkpoints.edit_file import Edit
from pkm_lightning.checkpoints.edit_folder import REMOVED
from pkm_lightning.errors import CheckpointError

_LABELS = (
    ("learned", "prompts that were learned"),
    ("test_prompts", "test prompts, never learned"),
    ("question", "questions, never learned"),
)

#: Share of the learned prompts below which, and share of the bound above which, the bound is what limits an edit.
_MOST_LEARNED, _NEAR = 0.9, 0.75


def result_lines(edit: Edit, file: Path) -> list[str]:
    """Returns the lines that a new edit is shown by."""
    figures = edit.figures
    lines = [
        f"{len(edit.facts)} facts in {edit.n_lines:,} rows, {file.stat().st_size:,} bytes, {figures['steps']} steps in "
        f"{figures['seconds']:.1f} s (ended by: {figures['ended']})"
    ]
    for name, label in _LABELS:
        if name in figures:
            lines.append(f"  {label:<28} {_change(figures[name])}")
    bound = edit.settings["kl_bound"]
    within = "within" if figures["kl"] <= bound else "ABOVE"
    lines.append(
        f"  KL on {figures['kl_tokens']:,} tokens of other text: {figures['kl']:.5f} nats per token, {within} the "
        f"bound of {bound:g}"
    )
    if figures["kl"] > bound:
        lines.append("  lower rows_per_fact, give more drift_path text, or write fewer facts at a time")
    elif figures["learned"]["after"] < _MOST_LEARNED and figures["kl"] > _NEAR * bound:
        lines.append(
            "  the bound leaves no room for the rest: a higher kl_bound= writes more, and changes more of the rest"
        )
    for name, collision in figures.get("collisions", {}).items():
        lines += _collision(name, collision)
    return [*lines, f"written to {file} and applied"]


def _change(figure: Mapping[str, Any]) -> str:
    return f"{100 * figure['after']:5.1f}% exact, before {100 * figure['before']:.1f}% ({figure['prompts']} prompts)"


def _collision(name: str, collision: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  shares {collision['rows']:,} rows with {name}: its prompts {100 * collision['after']:.1f}% exact, before "
        f"{100 * collision['before']:.1f}%"
    ]
    lost = collision["lost"]
    if lost:
        shown = "; ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        lines.append(f"    no longer answered right: {shown}")
    return lines


@dataclass(frozen=True)
class Listing:
    """One edit of a list.

    Attributes:
        file: of the edit.
        state: `applied`, `removed`, `misfit` (of other weights, and refused), or `damaged`.
        edit: None where the file is damaged.
    """

    file: Path
    state: str
    edit: Edit | None

    def record(self) -> dict[str, Any]:
        """Returns it for programs."""
        record: dict[str, Any] = {"name": self.file.stem, "state": self.state, "file": str(self.file)}
        if self.edit is None:
            return record
        return {
            **record,
            "facts": len(self.edit.facts),
            "rows": self.edit.n_lines,
            "bytes": self.file.stat().st_size,
            "created": self.edit.created,
            "note": self.edit.note,
            "weights": self.edit.weights,
            "figures": self.edit.figures,
        }


def list_edits(files: Sequence[Path], weights: str) -> list[Listing]:
    """Returns the edits in files.

    Args:
        files: of one folder of edits; those that are not applied lie in its folder of removed ones.
        weights: digest of the weights that the folder belongs to.
    """
    listings = []
    for file in files:
        state = "removed" if file.parent.name == REMOVED else "applied"
        try:
            edit = Edit.load(file)
        except CheckpointError:
            listings.append(Listing(file, "damaged", None))
            continue
        listings.append(Listing(file, state if edit.weights == weights else "misfit", edit))
    return listings


def edit_table(listings: Sequence[Listing]) -> str:
    """Returns a table of edits."""
    table = Table(title=None)
    for heading in ("edit", "state", "facts", "rows", "bytes", "learned", "test prompts", "KL", "created", "note"):
        table.add_column(heading, justify="right" if heading in ("facts", "rows", "bytes") else "left")
    for listing in listings:
        edit = listing.edit
        if edit is None:
            table.add_row(listing.file.stem, listing.state, *[""] * 8)
            continue
        figures = edit.figures
        table.add_row(
            listing.file.stem,
            listing.state,
            str(len(edit.facts)),
            f"{edit.n_lines:,}",
            f"{listing.file.stat().st_size:,}",
            *(_after(figures, name) for name in ("learned", "test_prompts")),
            f"{figures['kl']:.5f}" if "kl" in figures else "",
            edit.created[:10],
            edit.note,
        )
    text = io.StringIO()
    Console(file=text, width=120, markup=False, emoji=False).print(table)
    return text.getvalue().rstrip("\n")


def _after(figures: Mapping[str, Any], name: str) -> str:
    return f"{100 * figures[name]['after']:.1f}%" if name in figures else ""


def full_record(edit: Edit) -> str:
    """Returns all of an edit but its deltas, as JSON."""
    record = {
        "name": edit.name,
        "created": edit.created,
        "note": edit.note,
        "weights": edit.weights,
        "rows": {table: deltas.lines_U.tolist() for table, deltas in edit.tables.items()},
        "settings": edit.settings,
        "figures": edit.figures,
        "facts": edit.facts,
    }
    return json.dumps(record, ensure_ascii=False, indent=1)
