"""What `edit` prints: its result, a table of edits, and all of one edit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pkm_lightning.adaptation.facts_file import Fact, parse_fact
from pkm_lightning.checkpoints.edit_file import Edit
from pkm_lightning.checkpoints.edit_folder import REMOVED
from pkm_lightning.errors import CheckpointError, counted

#: What `edit` writes where there is nothing to learn.
KNOWN = "nothing to learn: every prompt is answered already; no edit is written"

_LABELS = (
    ("learned", "prompts that were learned"),
    ("test_prompts", "test prompts, never learned"),
    ("question", "questions, never learned"),
)

#: Share of the learned prompts below which something limits an edit, and of the bound above which that is the bound.
_MOST_LEARNED, _NEAR = 0.9, 0.75


def repeats(facts: Sequence[Fact], edits: Iterable[Edit]) -> list[str]:
    """Returns a line per edit that has some of the prompts that are to be learned."""
    lines = []
    for edit in edits:
        earlier = [parse_fact(f"edit {edit.name}", record) for record in edit.facts]
        written = {prompt: fact.answer for fact in earlier for prompt in fact.learned}
        both = [(fact, written[fact.prompt]) for fact in facts if fact.prompt in written]
        if both:
            are, others = "is" if len(both) == 1 else "are", sum(fact.answer != answer for fact, answer in both)
            another = f", {others:,} with another answer" if others else ""
            lines.append(f"{len(both):,} of the facts (same prompt) {are} already written by edit {edit.name}{another}")
    return lines


def result_lines(edit: Edit, file: Path) -> list[str]:
    """Returns the lines that a new edit is shown by; the last one is a warning where nothing was learned."""
    figures = edit.figures
    sizes = [counted(edit.n_lines, "row"), counted(file.stat().st_size, "byte"), counted(figures["steps"], "step")]
    lines = [
        f"{counted(len(edit.facts), 'fact')} in {', '.join(sizes)} in {figures['seconds']:.1f} s (ended by: "
        f"{figures['ended']})"
    ]
    for name, label in _LABELS:
        if name in figures:
            lines.append(f"  {label:<28} {_change(figures[name])}")
    bound = edit.settings["kl_bound"]
    tokens, within = counted(figures["kl_tokens"], "token"), "within" if figures["kl"] <= bound else "ABOVE"
    lines.append(f"  KL on {tokens} of other text: {figures['kl']:.5f} nats per token, {within} the bound of {bound:g}")
    learned = figures["learned"]
    nothing = learned["after"] <= learned["before"]
    if not nothing and (figures["kl"] > bound or learned["after"] < _MOST_LEARNED):
        lines.append(f"  {_limit(figures, bound)}")
    for name, collision in figures.get("collisions", {}).items():
        lines += _collision(name, collision)
    lines.append(f"written to {file} and applied")
    if nothing:
        lines.append(f"nothing was learned: no more prompts are answered than before; {_limit(figures, bound)}")
    return lines


def _limit(figures: Mapping[str, Any], bound: float) -> str:
    """Returns what limits an edit, and what to try."""
    if figures["kl"] > bound:
        return "lower rows_per_fact, give more drift_path text, or write fewer facts at a time"
    if figures["kl"] > _NEAR * bound:
        return "the bound leaves no room for the rest: a higher kl_bound= writes more, and changes more of the rest"
    if figures["ended"] == "learned":
        return "it is lost as the rows are rounded to their dtype: try a higher margin="
    limit = {"steps": "steps", "seconds": "time"}[figures["ended"]]
    return f"the {limit} ended before the bound was reached: try a higher max_{figures['ended']}= or lr="


def _change(figure: Mapping[str, Any]) -> str:
    prompts = counted(figure["prompts"], "prompt")
    return f"{100 * figure['after']:5.1f}% exact, before {100 * figure['before']:.1f}% ({prompts})"


def _collision(name: str, collision: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  shares {counted(collision['rows'], 'row')} with {name}: its prompts {100 * collision['after']:.1f}% exact, "
        f"before {100 * collision['before']:.1f}%"
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
        state: `applied` or `removed`.
        fault: why it is refused: `misfit` (of other weights), `damaged`, or None.
        edit: None where the file is damaged.
    """

    file: Path
    state: str
    fault: str | None
    edit: Edit | None

    def record(self) -> dict[str, Any]:
        """Returns it for programs."""
        record: dict[str, Any] = {"name": self.file.stem, "state": self.state, "fault": self.fault}
        record["file"] = str(self.file)
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
            listings.append(Listing(file, state, "damaged", None))
            continue
        listings.append(Listing(file, state, None if edit.weights == weights else "misfit", edit))
    return listings


def edit_table(listings: Sequence[Listing]) -> str:
    """Returns a table of edits."""
    table = Table(title=None)
    for heading in ("edit", "state", "facts", "rows", "bytes", "learned", "test prompts", "KL", "created", "note"):
        table.add_column(heading, justify="right" if heading in ("facts", "rows", "bytes") else "left")
    for listing in listings:
        edit, state = listing.edit, ", ".join(filter(None, (listing.state, listing.fault)))
        if edit is None:
            table.add_row(listing.file.stem, state, *[""] * 8)
            continue
        figures = edit.figures
        table.add_row(
            listing.file.stem,
            state,
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
