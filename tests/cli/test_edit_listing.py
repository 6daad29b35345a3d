"""What `edit` prints about a new edit, about facts that others have written, and about edits of other weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.checkpoints.edit_file import Edit, LineDeltas
from pkm_lightning.cli.edit_listing import edit_table, list_edits, repeats, result_lines

TABLES = {"tables.0.weight": LineDeltas(torch.tensor([3]), torch.ones(1, 2))}


def written(tmp_path: Path, *, name: str = "town", weights: str = "w", **figures: Any) -> tuple[Edit, Path]:
    """Returns an edit with one fact, and the file that it is saved to."""
    figures = {"kl": 0.0, "kl_tokens": 5000, "steps": 1, "seconds": 1.0, "ended": "steps", **figures}
    figures["learned"] = {
        "prompts": 4,
        **dict(zip(("before", "after"), figures.pop("learned", (0.0, 1.0)), strict=True)),
    }
    facts = (Fact("is zob", "7", ("a zob",)).record(),)
    edit = Edit(name, weights, TABLES, facts=facts, settings={"kl_bound": 0.01}, figures=figures)
    file = tmp_path / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    edit.save(file)
    return edit, file


@pytest.mark.parametrize(
    ("figures", "advice", "is_last"),
    [
        ({"learned": (0.0, 0.0), "kl": 0.0001}, "steps ended before the bound was reached: .* max_steps= or lr=", True),
        ({"learned": (0.0, 0.0), "ended": "seconds"}, "time ended before the .* max_seconds= or lr=", True),
        ({"learned": (0.25, 0.25), "kl": 0.009}, "the bound leaves no room for the rest: a higher kl_bound=", True),
        ({"learned": (0.25, 0.0), "kl": 0.02}, "lower rows_per_fact, ", True),
        ({"learned": (0.0, 0.5), "kl": 0.0001}, "max_steps= or lr=", False),
        ({"learned": (0.0, 0.5), "kl": 0.009}, "a higher kl_bound=", False),
        ({"learned": (0.0, 0.5), "ended": "learned"}, "a higher margin=", False),
        ({"kl": 0.02}, "lower rows_per_fact, ", False),
        ({"kl": 0.009}, None, False),
        ({"learned": (0.5, 0.95)}, None, False),
    ],
)
def test_an_edit_that_learned_little_says_what_limits_it(
    tmp_path: Path, figures: dict[str, Any], advice: str | None, is_last: bool
) -> None:
    lines = result_lines(*written(tmp_path, **figures))
    assert lines[0].startswith("1 fact in 1 row, ")
    advised = [line for line in lines if "=" in line or "lower rows_per_fact" in line]
    assert len(advised) == (advice is not None), lines
    if advice is not None:
        assert re.search(advice, advised[0]), advised
    assert lines[-1].startswith("nothing was learned: " if is_last else "written to ")
    assert f"written to {tmp_path / 'town.safetensors'} and applied" in lines


def test_facts_that_an_edit_has_written_are_counted(tmp_path: Path) -> None:
    edit, _ = written(tmp_path)
    both = [Fact("is zob", "7"), Fact("a zob", "8"), Fact("is vex", "b")]
    assert repeats(both[::2], [edit]) == ["1 of the facts (same prompt) is already written by edit town"]
    assert repeats(both, [edit]) == [
        "2 of the facts (same prompt) are already written by edit town, 1 with another answer"
    ]
    assert repeats(both[2:], [edit]) == []


def test_an_edit_that_does_not_fit_is_listed_as_applied_or_removed(tmp_path: Path) -> None:
    files = [written(tmp_path, name=name, weights=weights)[1] for name, weights in (("a", "w"), ("b", "other"))]
    files.append(written(tmp_path / "removed", name="c", weights="other")[1])
    files.append(tmp_path / "removed" / "d.safetensors")
    files[-1].write_bytes(files[0].read_bytes()[:-1])
    listings = list_edits(files, "w")
    states = [(one.record()["state"], one.record()["fault"]) for one in listings]
    assert states == [("applied", None), ("applied", "misfit"), ("removed", "misfit"), ("removed", "damaged")]
    for cell in ("│ applied ", "│ applied, misfit ", "│ removed, misfit ", "│ removed, damaged "):
        assert edit_table(listings).count(cell) == 1, edit_table(listings)
