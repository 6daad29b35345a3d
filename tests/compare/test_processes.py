"""Runs as processes: a failure affects no other run, and a comparison that stops stops its runs in order."""

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

from pkm_lightning.compare import processes as module
from pkm_lightning.compare.processes import Processes, RunEnd, last_line, threads_per_process
from pkm_lightning.compare.schedule import ScheduledRun

#: Stands for `fit`: does what the run's first override names.
PROGRAM = {
    "fine": "print('all good')",
    "threads": "import os; print(os.environ['OMP_NUM_THREADS'])",
    "wrong": "import sys; print('error: no such thing'); sys.exit(2)",
    "crash": "import os, signal; print('on it', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "silent": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "slow": "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('stopped in order', flush=True), sys.exit(143)))\n"
    "print('started', flush=True)\ntime.sleep(60)",
}


@pytest.fixture(autouse=True)
def _short_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.02)


class Fakes(Processes):
    """Processes that run small programs."""

    def command(self, run: ScheduledRun) -> list[str]:
        # Without site packages the interpreter starts several times faster.
        return [sys.executable, "-I", "-S", "-c", PROGRAM[run.overrides[0]]]


def scheduled(out: Path, *names: str) -> list[ScheduledRun]:
    return [ScheduledRun(f"{name}-{i}", i, None, (name,), out / "runs" / f"{name}-{i}") for i, name in enumerate(names)]


def fakes(out: Path, jobs: int = 1, ranks: int = 1) -> Fakes:
    return Fakes(flags=[], logs=out / "logs", jobs=jobs, ranks=ranks, resume="auto")


def ends(processes: Processes, runs: list[ScheduledRun]) -> dict[str, RunEnd]:
    return {end.run.overrides[0]: end for end in processes.run(runs, lambda _: None)}


def test_a_run_that_fails_affects_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks one pool of two jobs: the end of each run, how many ran at a time, and the threads of each."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    counts: list[int] = []
    runs = scheduled(tmp_path, "wrong", "crash", "fine", "threads")
    ended = {
        end.run.overrides[0]: end
        for end in fakes(tmp_path, jobs=2, ranks=2).run(runs, lambda running: counts.append(len(running)))
    }
    assert {name: end.exit_code for name, end in ended.items()} == {
        "wrong": 2,
        "crash": -signal.SIGKILL,
        "fine": 0,
        "threads": 0,
    }
    assert ended["wrong"].reason == "no such thing"
    assert ended["crash"].reason == "killed by SIGKILL (out of memory?): on it"
    assert ended["fine"].last_line == "all good"
    assert ended["threads"].last_line == "2"
    assert max(counts) == 2


def test_cores_are_shared_unless_the_user_sets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [threads_per_process(n) for n in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert ends(fakes(tmp_path), scheduled(tmp_path, "threads"))["threads"].last_line == "5"


def test_output_of_an_earlier_start_does_not_explain_the_end(tmp_path: Path) -> None:
    ends(fakes(tmp_path), scheduled(tmp_path, "fine"))
    (killed,) = [replace(run, overrides=("silent",)) for run in scheduled(tmp_path, "fine")]
    assert ends(fakes(tmp_path), [killed])["silent"].reason == "killed by SIGKILL (out of memory?)"


def test_runs_of_one_variant_and_seed_in_two_folders_have_logs_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / "a" / "seed-0", tmp_path / "speed" / "a" / "warm-up"]
    logs = {fakes(tmp_path).log(ScheduledRun("a", 0, None, (), folder)) for folder in folders}
    assert len(logs) == 2


def test_a_caller_that_leaves_early_has_running_runs_stopped_in_order(tmp_path: Path) -> None:
    processes, runs = fakes(tmp_path, jobs=2), scheduled(tmp_path, "slow", "slow", "fine")

    def interrupt(running: list[ScheduledRun]) -> None:
        if all(last_line(processes.log(run)) == "started" for run in running):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), contextlib.closing(processes.run(runs, interrupt)) as ended:
        list(ended)
    assert [last_line(processes.log(run)) for run in runs] == ["stopped in order", "stopped in order", ""]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can signal a process when its parent dies")
def test_a_killed_comparison_takes_its_runs_with_it(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom test_processes import fakes, scheduled\n"
        f"out = Path({str(tmp_path)!r})\nlist(fakes(out).run(scheduled(out, 'slow'), lambda _: None))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "compare")])
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths})
    log = fakes(tmp_path).log(scheduled(tmp_path, "slow")[0])
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


def test_the_command_is_fit_with_the_overrides_and_its_directory() -> None:
    run = ScheduledRun("moe", 1, None, ("ffn=moe", "seed=1"), Path("it's here/seed-1"))
    command = Processes(flags=["--config-dir=mine"], logs=Path("logs"), jobs=1, ranks=1, resume="auto").command(run)
    assert command[1:4] == ["-m", "pkm_lightning", "fit"]
    assert command[4:] == ["--config-dir=mine", "ffn=moe", "seed=1", r"run_dir='it\'s here/seed-1'", "resume=auto"]
