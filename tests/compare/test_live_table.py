"""The progress of a comparison, on a terminal and elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_folders import FakeRun

from pkm_lightning.compare.live_table import LiveTable
from pkm_lightning.compare.processes import RunEnd
from pkm_lightning.compare.schedule import ScheduledRun


def scheduled(root: Path) -> list[ScheduledRun]:
    return [ScheduledRun(name, 1, None, (), root / name / "seed-1") for name in ("good", "bad", "next")]


def show(runs: list[ScheduledRun]) -> None:
    good, bad, _ = runs
    with LiveTable(runs, {run.variant: 100 for run in runs}, "runs") as table:
        table.show_running([good, bad])
        table.show_end(RunEnd(good, 0, "all good"))
        table.show_end(RunEnd(bad, -9, "[step] 3"))


def test_without_a_terminal_each_event_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = scheduled(tmp_path)
    for run in runs[:2]:
        FakeRun(run.variant, 1, 0.5, record={"status": "finished" if run.variant == "good" else "running"}).write(
            tmp_path
        )
    show(runs)
    assert capsys.readouterr().out.splitlines() == [
        "runs: 3 runs",
        "good seed 1: started",
        "bad seed 1: started",
        "good seed 1: finished in 100 s, test loss 0.5000",
        "bad seed 1: failed: killed by SIGKILL (out of memory?): [step] 3",
    ]


def test_on_a_terminal_a_table_shows_the_progress_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = scheduled(tmp_path)
    FakeRun("good", 1).write(tmp_path)
    FakeRun("bad", 1, record={"status": "running"}).write(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    show(runs)
    shown = capsys.readouterr().out
    assert "runs: 1 of 3 finished" in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if "seed 1" in line}
    assert "finished" in rows["good"]
    assert "100 / 100" in rows["good"]
    assert "10,000" in rows["good"]
    assert "failed" in rows["bad"]
    assert "waiting" in rows["next"]
