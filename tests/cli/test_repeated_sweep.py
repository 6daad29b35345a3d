"""Which runs a repeated sweep leaves as they are: those that have ended with its objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.cli.repeated_sweep import has_ended_in_sweep

COMMAND = {"sweep_dir": "sweep", "resume": "auto", "objective": "val/loss", "objective_mode": "min"}
OBJECTIVE = {"name": "val/loss", "mode": "min", "value": 2.0, "step": 8}


@pytest.mark.parametrize(
    ("record", "command", "expected"),
    [
        ({"status": "finished", "objective": OBJECTIVE}, {}, True),
        ({"status": "pruned", "objective": OBJECTIVE}, {}, True),
        ({"status": "finished", "objective": {**OBJECTIVE, "value": None}}, {}, True),
        ({"status": "finished"}, {}, False),
        ({"status": "interrupted", "objective": OBJECTIVE}, {}, False),
        ({"status": "failed", "objective": OBJECTIVE}, {}, False),
        ({"status": "finished", "objective": OBJECTIVE}, {"resume": "always"}, False),
        ({"status": "finished", "objective": OBJECTIVE}, {"resume": "never"}, False),
        ({"status": "finished", "objective": OBJECTIVE}, {"sweep_dir": None}, False),
        ({"status": "finished", "objective": OBJECTIVE}, {"objective": "val/perplexity"}, False),
        ({"status": "finished", "objective": OBJECTIVE}, {"objective_mode": "max"}, False),
        ({}, {}, False),
    ],
)
def test_only_an_end_with_the_same_objective_counts(
    tmp_path: Path, record: dict[str, Any], command: dict[str, Any], expected: bool
) -> None:
    if record:
        (tmp_path / "run.json").write_text(json.dumps(record))
    assert has_ended_in_sweep(tmp_path, {**COMMAND, **command}) is expected
