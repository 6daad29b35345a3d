"""Runs as processes: a failure affects no other run, and a comparison that stops stops its runs in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tree import ROOT

from pkm_lightning.compare import processes as module
from pkm_lightning.compare.fork_server import _signal
from pkm_lightning.compare.processes import Processes, RunEnd, last_line, threads_per_process
from pkm_lightning.compare.schedule import ScheduledRun

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can signal a process when its parent dies")
#: How runs become processes: each as a command, or forked by a server.
BOTH = pytest.mark.parametrize(
    "preload", [(), pytest.param(("stand_in_run",), marks=ON_LINUX)], ids=["started", "forked"]
)


@pytest.fixture(autouse=True)
def _short_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.02)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "compare")]))


class Fakes(Processes):
    """Processes that run `stand_in_run`."""

    def command(self, run: ScheduledRun) -> list[str]:
        return [sys.executable, "-m", "stand_in_run", run.overrides[0]]


def scheduled(out: Path, *names: str) -> list[ScheduledRun]:
    return [ScheduledRun(f"{name}-{i}", i, None, (name,), out / "runs" / f"{name}-{i}") for i, name in enumerate(names)]


def fakes(out: Path, jobs: int = 1, ranks: int = 1, preload: Sequence[str] = ()) -> Fakes:
    return Fakes(flags=[], logs=out / "logs", jobs=jobs, ranks=ranks, resume="auto", preload=preload)


def ends(processes: Processes, runs: list[ScheduledRun]) -> dict[str, RunEnd]:
    with processes:
        return {end.run.overrides[0]: end for end in processes.run(runs, lambda _: None)}


@BOTH
def test_a_run_that_fails_affects_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: Sequence[str]
) -> None:
    """Checks one pool of two jobs: the end of each run, how many ran at a time, and the threads of each."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    counts: list[int] = []
    runs = scheduled(tmp_path, "wrong", "crash", "fine", "threads", "raises", "place")
    with fakes(tmp_path, jobs=2, ranks=2, preload=preload) as processes:
        ended = {end.run.overrides[0]: end for end in processes.run(runs, lambda running: counts.append(len(running)))}
    codes = {"wrong": 2, "crash": -signal.SIGKILL, "fine": 0, "threads": 0, "raises": 1, "place": 0}
    assert {name: end.exit_code for name, end in ended.items()} == codes
    assert ended["wrong"].reason == "no such thing"
    assert ended["crash"].reason == "killed by SIGKILL (out of memory?): on it"
    assert ended["fine"].last_line == "all good"
    assert ended["threads"].last_line == "2"
    assert ended["raises"].last_line == "ValueError: no such value"
    assert ended["place"].last_line == "True True False ['place'] __main__ 0"
    if sys.platform == "linux":
        assert "['-m', 'stand_in_run', 'place']" in fakes(tmp_path).log(ended["place"].run).read_text()
    assert max(counts) == 2
    servers = [log.read_text() for log in (tmp_path / "logs").glob("fork-server.log")]
    assert servers == [""] * len(preload), "a server prints nothing"


def test_cores_are_shared_unless_the_user_sets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [threads_per_process(n) for n in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert ends(fakes(tmp_path), scheduled(tmp_path, "threads"))["threads"].last_line == "5"


@ON_LINUX
def test_a_forked_run_is_killed_before_it_has_a_session() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        _signal({process.pid: 3}, {"run": 3, "signal": signal.SIGKILL, "group": True})
        assert process.wait(30) == -signal.SIGKILL


def test_output_of_an_earlier_start_does_not_explain_the_end(tmp_path: Path) -> None:
    ends(fakes(tmp_path), scheduled(tmp_path, "fine"))
    (killed,) = [replace(run, overrides=("silent",)) for run in scheduled(tmp_path, "fine")]
    assert ends(fakes(tmp_path), [killed])["silent"].reason == "killed by SIGKILL (out of memory?)"


def test_runs_of_one_variant_and_seed_in_two_folders_have_logs_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / "a" / "seed-0", tmp_path / "speed" / "a" / "warm-up"]
    logs = {fakes(tmp_path).log(ScheduledRun("a", 0, None, (), folder)) for folder in folders}
    assert len(logs) == 2


@BOTH
def test_a_caller_that_leaves_early_has_running_runs_stopped_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: Sequence[str]
) -> None:
    """Stops two that stop when asked, one that has to be killed after a while, and none that waits."""
    monkeypatch.setattr(module, "GRACE", 1.2)
    processes = fakes(tmp_path, jobs=3, preload=preload)
    runs = scheduled(tmp_path, "slow", "slow", "stubborn", "fine")

    def interrupt(running: list[ScheduledRun]) -> None:
        if len(running) == 3 and all(last_line(processes.log(run)) == "started" for run in running):
            raise KeyboardInterrupt

    with processes, pytest.raises(KeyboardInterrupt), contextlib.closing(processes.run(runs, interrupt)) as ended:
        list(ended)
    lines = [last_line(processes.log(run)) for run in runs]
    assert lines == ["stopped in order", "stopped in order", "started", ""]


@ON_LINUX
@BOTH
def test_a_killed_comparison_takes_its_runs_with_it(tmp_path: Path, preload: Sequence[str]) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom test_processes import fakes, scheduled\n"
        f"out = Path({str(tmp_path)!r})\n"
        f"list(fakes(out, preload={preload!r}).run(scheduled(out, 'slow'), lambda _: None))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    log = fakes(tmp_path).log(scheduled(tmp_path, "slow")[0])
    try:
        _wait_for(log, "started")
    finally:
        parent.kill()
        parent.wait()
    _wait_for(log, "stopped in order")


@ON_LINUX
def test_runs_go_on_as_commands_where_the_server_was_killed(tmp_path: Path) -> None:
    """Kills the server during the first run: that one is stopped in order, and then the next one is started."""
    processes, runs = fakes(tmp_path, preload=("stand_in_run",)), scheduled(tmp_path, "slow", "fine")
    stopped: list[str] = []

    def kill(running: list[ScheduledRun]) -> None:
        server = processes._server
        if server is not None and last_line(processes.log(running[0])) == "started":
            server._process.kill()
        if running[0] is runs[1]:  # one at a time: the first one has ended for the comparison
            stopped.append(last_line(processes.log(runs[0])))

    with processes:
        slow, fine = processes.run(runs, kill)
    assert (slow.exit_code, fine.exit_code) == (-signal.SIGKILL, 0)
    assert set(stopped) == {"stopped in order"}


@ON_LINUX
def test_a_system_without_descriptors_of_processes_forks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert ends(fakes(tmp_path, preload=("stand_in_run",)), scheduled(tmp_path, "fine"))["fine"].exit_code == 0


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
