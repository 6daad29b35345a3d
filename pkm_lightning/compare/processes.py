"""Runs `fit` for each scheduled run in a process of its own, several at a time; a failure affects no other run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkm_lightning.compare.fork_server import CAN_FORK, ForkedRun, ForkServer, stop_with_parent
from pkm_lightning.compare.overrides import quoted
from pkm_lightning.compare.run_state import run_state
from pkm_lightning.compare.schedule import ScheduledRun
from pkm_lightning.errors import RunDirectoryError

#: States of a run directory in which its run is started, by `resume`.
STARTED = {
    "auto": ("absent", "interrupted"),
    "always": ("absent", "interrupted", "failed"),
    "never": ("absent",),  # earlier runs have been removed
}
#: Seconds between looks at the processes.
POLL = 0.5
#: Seconds that runs have to write their checkpoints after they were asked to stop.
GRACE = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEnd:
    """The end of a run's process.

    Args:
        run: the run.
        exit_code: below 0 the negated number of the signal that ended it.
        last_line: last line of its output.
    """

    run: ScheduledRun
    exit_code: int
    last_line: str

    @property
    def reason(self) -> str:
        """Why it did not finish, in one line."""
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            # Linux kills with SIGKILL where memory runs out; nothing in the process can report it.
            cause = " (out of memory?)" if name == "SIGKILL" else ""
            return f"killed by {name}{cause}: {self.last_line}".removesuffix(": ")
        return self.last_line.removeprefix("error: ") or f"exit code {self.exit_code}"


class StartedRun(subprocess.Popen[bytes]):
    """A run that was started as a command of its own."""

    def kill_session(self) -> None:
        """Sends SIGKILL to it and all that it has started."""
        os.killpg(self.pid, signal.SIGKILL)


class Processes:
    """Pool of processes, one per run; a context manager that ends the server of forked runs.

    Args:
        flags: Hydra's flags of the command line (`--config-dir=...`), passed on to every run.
        logs: folder for their output.
        jobs: runs at a time.
        ranks: processes of one run on this machine.
        resume: passed on to every run.
        preload: modules that a server imports, which then forks the runs; empty: each run is a command of its own.
    """

    def __init__(
        self, *, flags: Sequence[str], logs: Path, jobs: int, ranks: int, resume: str, preload: Sequence[str] = ()
    ) -> None:
        self._flags, self._logs, self._jobs, self._resume = list(flags), logs, jobs, resume
        self._threads = threads_per_process(jobs * ranks)
        self._preload = list(preload) if CAN_FORK else []
        self._server: ForkServer | None = None
        self._running: dict[StartedRun | ForkedRun, ScheduledRun] = {}
        self._log_starts: dict[ScheduledRun, int] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()

    def run(
        self, runs: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]
    ) -> Generator[RunEnd, None, None]:
        """Yields the end of each run; calls `tick` with the running ones every `POLL` seconds.

        If the caller leaves early, for example by an interruption, the running ones are asked to stop and waited for.
        """
        waiting = list(runs)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    run = waiting.pop(0)
                    self._running[self._start(run)] = run
                tick(list(self._running.values()))
                time.sleep(POLL)
                codes = {process: process.poll() for process in self._running}
                for process, code in codes.items():
                    if code is not None:
                        run = self._running.pop(process)
                        yield RunEnd(run, code, last_line(self.log(run), self._log_starts.pop(run)))
        finally:
            self._stop()

    def to_start(self, runs: Sequence[ScheduledRun]) -> list[ScheduledRun]:
        """Returns the runs that `resume` starts, given the states of their directories.

        Raises:
            RunDirectoryError: another process holds one of them.
        """
        states = {run.folder: run_state(run.folder) for run in runs}
        held = [run.label for run in runs if states[run.folder] == "held"]
        if held:
            raise RunDirectoryError(f"{held[0]} is in use by another process; wait for it or stop it.")
        return [run for run in runs if states[run.folder] in STARTED[self._resume]]

    def log(self, run: ScheduledRun) -> Path:
        """Returns the file that collects the output of all starts of a run."""
        return self._logs / f"{'-'.join(run.folder.relative_to(self._logs.parent).parts)}.log"

    def command(self, run: ScheduledRun) -> list[str]:
        """Returns the command line of a run."""
        overrides = [*run.overrides, f"run_dir={quoted(str(run.folder))}", f"resume={self._resume}"]
        return [sys.executable, "-m", "pkm_lightning", "fit", *self._flags, *overrides]

    def _start(self, run: ScheduledRun) -> StartedRun | ForkedRun:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(run).open("ab") as log:
            # Where this start's output begins: an earlier start's last line must not explain this one's end.
            self._log_starts[run] = os.fstat(log.fileno()).st_size
            if (server := self._fork_server()) is not None:
                _, _, module, *arguments = self.command(run)
                return server.start(module, arguments, self.log(run))
            # With a session of its own Ctrl-C reaches only the comparison, which then asks each run to stop, once.
            return StartedRun(
                self.command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
                preexec_fn=stop_with_parent if sys.platform == "linux" else None,
            )

    def _environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self._threads), **os.environ}

    def _fork_server(self) -> ForkServer | None:
        """Returns the server, started with the first run; None without one, or where it has ended."""
        if self._server is None and self._preload:
            self._server = ForkServer(self._preload, self._environment(), self._logs / "fork-server.log")
        if self._server is not None and not self._server.is_alive:
            _log.warning("the process that forks runs has ended (see %s/fork-server.log); runs are started", self._logs)
            self._server, self._preload = None, []
        return self._server

    def _stop(self) -> None:
        for process in self._running:
            process.terminate()  # rank 0 only: it ends the other ranks in order
        deadline = time.monotonic() + GRACE
        for process in self._running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill_session()
                process.wait()
        self._running.clear()


def threads_per_process(processes: int) -> int:
    """Returns the share of the cores for each of `processes`, at least 1; a set OMP_NUM_THREADS overrules it."""
    return max(1, (os.cpu_count() or 1) // processes)


def last_line(log: Path, start: int = 0) -> str:
    """Returns the last line with text in the last 64 KiB of `log` and after `start` bytes; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")
