"""Runs as processes: one that fails costs only itself, and who stops the comparison stops them in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tree import ROOT

from pkm_lightning.compare.plan import PlannedRun
from pkm_lightning.compare.processes import Ended, Processes, last_line, threads

#: Stands for `fit`: does what the run's first override says.
PROGRAM = {
    "fine": "print('all good')",
    "wrong": "import sys; print('error: no such thing'); sys.exit(2)",
    "crash": "import os, signal; print('on it', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "silent": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "slow": "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('stopped in order', flush=True), sys.exit(143)))\n"
    "print('started', flush=True)\ntime.sleep(60)",
    "threads": "import os; print(os.environ['OMP_NUM_THREADS'])",
}


class Fakes(Processes):
    """Processes that run small programs."""

    def command(self, run: PlannedRun) -> list[str]:
        return [sys.executable, "-c", PROGRAM[run.overrides[0]]]


def planned(out: Path, *what: str) -> list[PlannedRun]:
    return [PlannedRun(f"{name}-{i}", i, None, (name,), out / "runs" / f"{name}-{i}") for i, name in enumerate(what)]


def fakes(out: Path, jobs: int = 1, ranks: int = 1) -> Fakes:
    return Fakes(flags=[], logs=out / "logs", jobs=jobs, ranks=ranks, resume="auto")


def ends(processes: Processes, runs: list[PlannedRun]) -> dict[str, Ended]:
    return {end.run.overrides[0]: end for end in processes.run(runs, lambda _: None)}


def test_one_that_fails_costs_only_itself(tmp_path: Path) -> None:
    found = ends(fakes(tmp_path), planned(tmp_path, "wrong", "crash", "fine"))
    assert {name: end.exit_code for name, end in found.items()} == {"wrong": 2, "crash": -signal.SIGKILL, "fine": 0}
    assert found["wrong"].words == "no such thing"
    assert found["crash"].words == "killed by SIGKILL (out of memory?): on it"
    assert found["fine"].last_line == "all good"


def test_what_an_earlier_sitting_said_is_not_taken_for_its_end(tmp_path: Path) -> None:
    ends(fakes(tmp_path), planned(tmp_path, "fine"))
    (killed,) = [replace(run, overrides=("silent",)) for run in planned(tmp_path, "fine")]
    assert ends(fakes(tmp_path), [killed])["silent"].words == "killed by SIGKILL (out of memory?)"


def test_runs_of_one_arm_and_seed_in_two_folders_have_logs_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / "a" / "seed-0", tmp_path / "speed" / "a" / "warm-up"]
    logs = {fakes(tmp_path).log(PlannedRun("a", 0, None, (), folder)) for folder in folders}
    assert len(logs) == 2


def test_not_more_run_at_a_time_than_jobs(tmp_path: Path) -> None:
    seen: list[int] = []
    list(fakes(tmp_path, jobs=2).run(planned(tmp_path, *["fine"] * 5), lambda running: seen.append(len(running))))
    assert max(seen) == 2


def test_who_leaves_early_has_the_running_ones_stopped_in_order(tmp_path: Path) -> None:
    processes, runs = fakes(tmp_path, jobs=2), planned(tmp_path, "slow", "slow", "fine")

    def impatient(running: list[PlannedRun]) -> None:
        if all(last_line(processes.log(run)) == "started" for run in running):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), contextlib.closing(processes.run(runs, impatient)) as found:
        list(found)
    assert [last_line(processes.log(run)) for run in runs] == ["stopped in order", "stopped in order", ""]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_killed_comparison_takes_its_runs_with_it(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom test_processes import fakes, planned\n"
        f"out = Path({str(tmp_path)!r})\nlist(fakes(out).run(planned(out, 'slow'), lambda _: None))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "compare")])
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths})
    log = fakes(tmp_path).log(planned(tmp_path, "slow")[0])
    try:
        _wait_for(log, "started")
    finally:
        parent.kill()
        parent.wait()
    _wait_for(log, "stopped in order")


def _wait_for(log: Path, line: str) -> None:
    deadline = time.monotonic() + 60
    while last_line(log) != line:
        assert time.monotonic() < deadline, f"{log}: {last_line(log)!r}"
        time.sleep(0.1)


def test_cores_are_shared_out_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(n) for n in (1, 3, 20)] == [8, 2, 1]
    assert ends(fakes(tmp_path / "a", jobs=2, ranks=2), planned(tmp_path / "a", "threads"))["threads"].last_line == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert ends(fakes(tmp_path / "b"), planned(tmp_path / "b", "threads"))["threads"].last_line == "5"


def test_the_command_is_fit_with_the_overrides_and_its_directory() -> None:
    run = PlannedRun("moe", 1, None, ("ffn=moe", "seed=1"), Path("it's here/seed-1"))
    command = Processes(flags=["--config-dir=mine"], logs=Path("logs"), jobs=1, ranks=1, resume="auto").command(run)
    assert command[1:4] == ["-m", "pkm_lightning", "fit"]
    assert command[4:] == ["--config-dir=mine", "ffn=moe", "seed=1", r"run_dir='it\'s here/seed-1'", "resume=auto"]
