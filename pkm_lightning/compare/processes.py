"""Runs `fit` for each planned run in a process of its own, several at a time; one that fails costs only itself."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkm_lightning.compare.overrides import quoted
from pkm_lightning.compare.plan import PlannedRun
from pkm_lightning.compare.run_state import run_state
from pkm_lightning.errors import RunDirectoryError

#: States of a run directory in which it is run, by `resume`.
STARTED = {
    "auto": ("absent", "interrupted"),
    "always": ("absent", "interrupted", "failed"),
    "never": ("absent",),  # what was there has been removed
}
#: Seconds between looks at the processes.
POLL = 0.5
#: Seconds that runs have, after they were asked to stop, to write their checkpoints.
GRACE = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """How the process of a run ended.

    Args:
        run: which one.
        exit_code: below 0: the number of the signal that ended it.
        last_line: of its output.
    """

    run: PlannedRun
    exit_code: int
    last_line: str

    @property
    def words(self) -> str:
        """Why it did not finish, in a line."""
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            why = " (out of memory?)" if name == "SIGKILL" else ""
            return f"killed by {name}{why}: {self.last_line}".removesuffix(": ")
        return self.last_line.removeprefix("error: ") or f"exit code {self.exit_code}"


class Processes:
    """Runs planned runs as processes.

    Args:
        flags: of the command line, for Hydra (`--config-dir=...`).
        logs: folder of their output.
        jobs: runs at a time.
        ranks: processes of a run on this machine.
        resume: of every run.
    """

    def __init__(self, *, flags: Sequence[str], logs: Path, jobs: int, ranks: int, resume: str) -> None:
        self._flags, self._logs, self._jobs, self._resume = list(flags), logs, jobs, resume
        self._threads = threads(jobs * ranks)
        self._running: dict[subprocess.Popen[bytes], PlannedRun] = {}
        self._written: dict[PlannedRun, int] = {}

    def run(
        self, planned: Sequence[PlannedRun], tick: Callable[[list[PlannedRun]], None]
    ) -> Generator[Ended, None, None]:
        """Yields each run as it ends; `tick` is told now and then what is running.

        Whatever ends this early, an interruption say, first asks the running ones to stop and waits for them.
        """
        waiting = list(planned)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    run = waiting.pop(0)
                    self._running[self._start(run)] = run
                tick(list(self._running.values()))
                time.sleep(POLL)
                for process in [process for process in self._running if process.poll() is not None]:
                    run = self._running.pop(process)
                    yield Ended(run, process.returncode, last_line(self.log(run), self._written.pop(run)))
        finally:
            self._stop()

    def to_start(self, planned: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Those that are still to be run, as `resume` says it.

        Raises:
            RunDirectoryError: another process has one of them.
        """
        states = {run.folder: run_state(run.folder) for run in planned}
        held = [run.label for run in planned if states[run.folder] == "held"]
        if held:
            raise RunDirectoryError(f"{held[0]} is being run by another process; wait for it or stop it.")
        return [run for run in planned if states[run.folder] in STARTED[self._resume]]

    def log(self, run: PlannedRun) -> Path:
        """The file with the run's output, of all sittings."""
        return self._logs / f"{'-'.join(run.folder.relative_to(self._logs.parent).parts)}.log"

    def command(self, run: PlannedRun) -> list[str]:
        """The command line of a run."""
        own = [*run.overrides, f"run_dir={quoted(str(run.folder))}", f"resume={self._resume}"]
        return [sys.executable, "-m", "pkm_lightning", "fit", *self._flags, *own]

    def _start(self, run: PlannedRun) -> subprocess.Popen[bytes]:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(run).open("ab") as log:
            self._written[run] = log.tell()
            # A session of its own: Ctrl-C reaches the comparison, which then asks each run to stop, once.
            return subprocess.Popen(
                self.command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self._threads), **os.environ},
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _stop(self) -> None:
        for process in self._running:
            process.terminate()  # rank 0 alone: it ends the others in order
        deadline = time.monotonic() + GRACE
        for process in self._running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()


def threads(processes: int) -> int:
    """Threads a process, where OMP_NUM_THREADS does not say it: its share of the cores."""
    return max(1, (os.cpu_count() or 1) // processes)


def last_line(log: Path, start: int = 0) -> str:
    """The last line of text in `log` after `start` bytes, of its last 64 KiB; empty without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 65536))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


def _die_with_parent() -> None:
    """In the new process: it is asked to stop when the comparison is killed, rather than go on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
