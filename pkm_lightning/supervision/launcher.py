"""Starts the other ranks of this machine and watches them: after a rank is lost, the others end within seconds.

Lightning's own watch kills rank 0 when another rank dies, before rank 0 can report the reason or close the run's
record. Here the main thread is given time to notice the loss through an error of its own, since gloo closes its
connections. Only where the main thread hangs, as in NCCL, does the watch end the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from pkm_lightning.errors import ConfigError
from pkm_lightning.supervision.error_folder import ErrorFolder
from pkm_lightning.supervision.meeting_point import check_meeting_point

#: Exit code of a process that ends because another was lost; sysexits.h's EX_TEMPFAIL: the same command may succeed.
RANK_LOST = 75
#: Seconds that a main thread has to notice a loss, and that the other ranks have to end after rank 0 has ended.
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RankFailure:
    """A rank that was lost.

    Args:
        sentence: for the user, for example `rank 1 was killed by SIGKILL`.
        exit_code: of the ranks that end because of it.
    """

    sentence: str
    exit_code: int


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher with a watch over the ranks that it starts, and in those ranks a watch over rank 0.

    Attributes:
        on_hang: called by the watch when the main thread hangs after a loss, just before the process is ended.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_hang: Callable[[RankFailure], None] | None = None
        self._errors: ErrorFolder | None = None
        self._is_rank_0 = False
        self._closed = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Starts the other ranks, unless they run already or were started externally, then calls `function`.

        Raises:
            ConfigError: devices and nodes do not fit the ranks that were started externally.
        """
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise ConfigError(f"trainer.devices, trainer.num_nodes: {' '.join(str(error).split())}") from None
        if not self.cluster_environment.creates_processes_externally:
            self._errors, self._is_rank_0 = ErrorFolder.make(), True
            self._call_children_scripts()
            self._start_watch()
        elif self._errors is None and (inherited := ErrorFolder.inherited()):
            self._errors = inherited
            self._start_watch()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    @property
    def reports_failures(self) -> bool:
        """This process reports a loss to the user; the other ranks of a launch leave that to rank 0 while it lives."""
        if self._errors is None or self._is_rank_0:
            return True
        return self._errors.launcher_is_gone and self._errors.claim_report()

    def failure(self) -> RankFailure | None:
        """Returns the rank of this launch that is known to be lost, or None."""
        if self._errors is not None and not self._is_rank_0:
            return RankFailure("rank 0 was killed", RANK_LOST) if self._errors.launcher_is_gone else None
        for rank, process in enumerate(self.procs, 1):
            code = process.poll()
            # A rank that ended with RANK_LOST only noticed the loss of another.
            if self._errors is not None and code not in (None, 0, RANK_LOST):
                return _failure(rank, int(code), self._errors.read(rank))
        return None

    def await_failure(self, seconds: float = GRACE_SECONDS) -> RankFailure | None:
        """Returns `failure()`, for which it waits: a connection can close before the process behind it has ended."""
        until = time.monotonic() + seconds
        while (failure := self.failure()) is None and self._errors is not None and time.monotonic() < until:
            time.sleep(_POLL_SECONDS / 4)
        return failure

    def close(self, *, failed: bool) -> None:
        """Ends the watch and the started ranks: at once if this rank failed, else after `GRACE_SECONDS`."""
        self._closed.set()
        if self._errors is None:
            return
        until = time.monotonic() + (0.0 if failed else GRACE_SECONDS)
        for process in self.procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._end_children()
        if self._is_rank_0:
            self._errors.remove()

    def _start_watch(self) -> None:
        threading.Thread(target=self._watch, name="watch over the ranks", daemon=True).start()

    def _watch(self) -> None:
        while self.failure() is None:
            if self._closed.wait(_POLL_SECONDS):
                return
        if self._closed.wait(GRACE_SECONDS):
            return
        failure = self.failure()
        try:
            if self.on_hang is not None and failure is not None:
                self.on_hang(failure)
        finally:
            self._end_children()
            if self._errors is not None and self._is_rank_0:
                self._errors.remove()
            # The main thread hangs within a call of a library, where no exception reaches it.
            os._exit(RANK_LOST if failure is None else failure.exit_code)

    def _end_children(self) -> None:
        for process in self.procs:
            if process.poll() is None:
                process.kill()
                process.wait()


def _failure(rank: int, code: int, reason: str | None) -> RankFailure:
    names = {number.value: number.name for number in signal.Signals}
    if code < 0:
        return RankFailure(f"rank {rank} was killed by {names.get(-code, f'signal {-code}')}", RANK_LOST)
    if code - 128 in names:  # it has handled the signal, and ended as shells report one
        return RankFailure(f"rank {rank} was stopped by {names[code - 128]}", code)
    return RankFailure(f"rank {rank} failed: {reason}" if reason else f"rank {rank} ended with exit code {code}", code)


class WatchedRanks(ParallelStrategy):
    """Mixin for a strategy, named before it in the class's bases: `WatchedLauncher` starts and watches its ranks."""

    def _configure_launcher(self) -> None:
        if getattr(self, "_start_method", "popen") != "popen":
            # torch.multiprocessing watches the ranks that it forks or spawns.
            super()._configure_launcher()
            return
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            check_meeting_point(self.cluster_environment)
        processes = len(self.parallel_devices or [])
        self._launcher = WatchedLauncher(self.cluster_environment, processes, getattr(self, "num_nodes", 1))
