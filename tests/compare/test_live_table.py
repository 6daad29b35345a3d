"""The progress of a comparison, on a terminal and elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from run_folders import FakeRun

from pkm_lightning.compare.live_table import shown_runs
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.schedule import ScheduledRun
from pkm_lightning.compare.time_left import TimeLeft


def scheduled(root: Path) -> list[ScheduledRun]:
    return [ScheduledRun(name, 1, None, (), root / name / "seed-1") for name in ("good", "bad", "next")]


class Pool(Processes):
    """Pool that ends the first run well and has the second one killed; the third waits."""

    def __init__(self) -> None:
        pass

    def run(self, runs: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]) -> Iterator[RunEnd]:  # type: ignore[override]
        tick(list(runs[:2]))
        yield RunEnd(runs[0], 0, "all good")
        yield RunEnd(runs[1], -9, "[step] 3")


class TenMinutes(TimeLeft):
    """Estimate that knows the time after the first end."""

    def seconds(self) -> float | None:
        return 600.0 if self._ends else None


def show(runs: list[ScheduledRun]) -> None:
    steps, time_left = {run.variant: 100 for run in runs}, TenMinutes(jobs=2)
    time_left.plan(runs, steps)
    assert len(list(shown_runs(runs, runs, steps, "runs", Pool(), time_left))) == 2


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
        "good seed 1: finished in 100 s, test loss 0.5000; about 10 min left",
        "bad seed 1: failed: killed by SIGKILL (out of memory?): [step] 3; about 10 min left",
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
    assert "runs: 1 of 3 finished, about 10 min left" in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if "seed 1" in line}
    assert "finished" in rows["good"]
    assert "100 / 100" in rows["good"]
    assert "10,000" in rows["good"]
    assert "failed" in rows["bad"]
    assert "waiting" in rows["next"]
