"""What the runs of a sweep came to: status, the best of them, the keys that vary, sweep.csv and the table."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pkm_lightning.cli.sweep_record import (
    JobFailure,
    best_trial,
    note_failure,
    note_trial,
    recorded_trials,
    show_sweep,
    varying_keys,
)


def write(folder: Path, status: str, value: float | None, mode: str = "min", **record: Any) -> None:
    """Writes the record of a trial that ended in `status`."""
    folder.mkdir(parents=True)
    objective = {"name": "val/loss", "mode": mode, "value": value, "step": 8}
    content = {"status": status, "objective": objective, "seconds": {"total": 2.5}, **record}
    (folder / "run.json").write_text(json.dumps(content))


def swept(folder: Path, *values: str) -> Any:
    """Returns the trials of a sweep over optim.lr whose records `folder` holds."""
    with recorded_trials() as trials:
        for i, value in enumerate(values):
            note_trial(folder / str(i), [f"optim.lr={value}", "++seed=1", f"run_dir={folder}", "~logger"])
            if not (folder / str(i)).exists():
                note_failure([], JobFailure("optim.lr=-1 is out of range", 2))
    return trials


def test_the_table_shows_every_trial_and_marks_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "0", "finished", 2.0, own_test=False)
    write(tmp_path / "1", "finished", 1.5, own_test=False)
    write(tmp_path / "2", "pruned", 1.0, reason="worse than the median")
    write(tmp_path / "3", "finished", None)
    write(tmp_path / "5", "failed", 0.5, reason="out of\nmemory")
    write(tmp_path / "6", "running", 0.1)
    show_sweep(swept(tmp_path, "0.001", "0.0030000000000001", "1", "9", "-1", "2", "4"), tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:8]] == ["run", "0", "1", "2", "3", "4", "5", "6"]
    assert shown[0].split() == ["run", "optim.lr", "val/loss", "step", "seconds", "status"]
    assert shown[2].split() == ["1", "0.003", "1.5000", "*", "8", "2.5", "finished"]
    assert "4" in shown[5]
    assert "refused: optim.lr=-1 is out of range" in shown[5]
    assert "best: run 1, val/loss 1.5000" in shown
    assert (
        f"report: python -m pkm_lightning report 'runs=[{tmp_path}]' out={tmp_path}/report report.metric=val/loss"
        in shown
    )
    assert shown[-1].startswith("The test reads what validations read")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [
        "finished", "finished", "pruned", "diverged", "refused", "failed", "interrupted"
    ]  # fmt: skip
    assert [row["best"] for row in rows] == ["0", "1", "0", "0", "0", "0", "0"]
    assert (rows[2]["reason"], rows[5]["reason"]) == ("worse than the median", "out of memory")
    assert [row["value"] for row in rows[:4]] == ["2.0", "1.5", "1.0", ""]


@pytest.mark.parametrize("name", ["lr=3,6", "my runs", "ünï", "it's", "[x]", "$HOME", "(y)#"])
def test_the_command_of_the_report_is_read_back(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / name / "0", "finished", 1.0)
    show_sweep(swept(tmp_path / name, "1"), tmp_path / name)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("report: "))
    runs, out, _ = OverridesParser.create().parse_overrides(shlex.split(line)[5:])
    (folder,) = runs.value()
    assert getattr(folder, "text", folder) == str(tmp_path / name)
    assert getattr(out.value(), "text", out.value()) == str(tmp_path / name / "report")


def test_more_is_better_where_the_record_says_so(tmp_path: Path) -> None:
    write(tmp_path / "0", "finished", 0.2, "max")
    write(tmp_path / "1", "finished", 0.4, "max")
    trials = swept(tmp_path, "1", "2")
    for trial in trials:
        trial.record = json.loads((trial.folder / "run.json").read_text())
    assert best_trial(trials) is trials[1]
    assert best_trial([]) is None


def test_keys_that_do_not_vary_are_left_out_unless_there_is_one_trial(tmp_path: Path) -> None:
    trials = swept(tmp_path, "1", "2")
    assert varying_keys(trials) == ["optim.lr"]
    assert varying_keys(trials[:1]) == ["optim.lr", "seed", "logger"]


def test_a_run_of_an_earlier_command_is_neither_this_one_nor_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "0", "finished", 1.0)
    write(tmp_path / "1", "finished", 2.0)
    trials = swept(tmp_path, "1", "2")
    trials[0].failure = "run_dir=0 holds a run with another configuration"
    show_sweep(trials, tmp_path)
    assert (trials[0].status, best_trial(trials)) == ("refused", trials[1])
    assert "refused: run_dir=0 holds a run with another configuration" in capsys.readouterr().out


def test_a_sweep_whose_runs_were_all_refused_shows_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = swept(tmp_path, "-1", "-2")
    show_sweep(trials, tmp_path)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    assert math.isnan(trials[0].value)
    assert trials[0].reason == "optim.lr=-1 is out of range"
