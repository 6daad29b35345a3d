"""A repeated sweep leaves runs that have ended with its objective as they are, and resumes one that was killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from processes import finish, start
from small import SMALL_RUN, record, rows

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


@pytest.mark.slow
def test_the_same_command_completes_a_killed_sweep(tmp_path: Path) -> None:
    sizes = [size for size in SMALL_RUN if not size.startswith(("callbacks.", "trainer.", "~"))]
    command = [
        "fit", "-m", *sizes, "ffn=dense", "callbacks=[metrics_csv,step_checkpoint]", "trainer.max_steps=40",
        "trainer.log_every_n_steps=2", "callbacks.step_checkpoint.every_n_steps=4", "seed=1,2", "run_dir=sweep",
    ]  # fmt: skip
    process, second = start(*command, cwd=tmp_path), tmp_path / "sweep" / "1"
    while not list(second.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    first = record(tmp_path / "sweep" / "0")
    assert (first["status"], record(second)["status"]) == ("finished", "running")
    output = finish(start(*command, cwd=tmp_path))
    assert record(tmp_path / "sweep" / "0") == first
    assert record(second)["status"] == "finished"
    steps = [int(row["step"]) for row in rows(second) if row["train/loss"]]
    assert steps == list(range(2, 41, 2))
    assert "best: run" in output
