"""Starts the other ranks of this machine and watches them: when one is lost, the others end within seconds.

Lightning's own watch kills rank 0 when another dies, before it could say why or close its record. Here the main thread
is given time to notice by itself (gloo closes its connections); only where it hangs, as in NCCL, is the process ended.
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
from pkm_lightning.supervision.last_words import LastWords

#: Exit code of a process that ends because another was lost; sysexits.h's EX_TEMPFAIL: the same command may succeed.
RANK_LOST = 75
#: Seconds that a main thread has to notice a loss by itself, and that the others have to end after rank 0 did.
GRACE = 10.0
_POLL = 0.2


@dataclass(frozen=True)
class RankFailure:
    """A rank that was lost: `rank 1 was killed by SIGKILL`, say, and the exit code of those that end because of it."""

    sentence: str
    exit_code: int


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher with a watch over the ranks that it starts, and in those a watch over rank 0.

    Attributes:
        on_stuck: called by the watch when the main thread hangs after a loss, just before the process is ended.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_stuck: Callable[[RankFailure], None] | None = None
        self._words: LastWords | None = None
        self._launches = False
        self._closed = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Starts the other ranks, unless that was done already or from outside, then calls `function`.

        Raises:
            ConfigError: devices and nodes do not fit the ranks that were started from outside.
        """
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise ConfigError(f"trainer.devices, trainer.num_nodes: {' '.join(str(error).split())}") from None
        if not self.cluster_environment.creates_processes_externally:
            self._words, self._launches = LastWords.make(), True
            self._call_children_scripts()
            self._start_watch()
        elif self._words is None and (inherited := LastWords.inherited()):
            self._words = inherited
            self._start_watch()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    @property
    def tells(self) -> bool:
        """It is for this process to tell the user of a loss: the others of this launch leave that to rank 0."""
        if self._words is None or self._launches:
            return True
        return self._words.launcher_is_gone and self._words.may_tell()

    def loss(self) -> RankFailure | None:
        """The rank of this launch that is known to be lost, if there is one."""
        if self._words is not None and not self._launches:
            return RankFailure("rank 0 was killed", RANK_LOST) if self._words.launcher_is_gone else None
        for rank, process in enumerate(self.procs, 1):
            code = process.poll()
            # Those that end with RANK_LOST have only seen that another is lost.
            if self._words is not None and code not in (None, 0, RANK_LOST):
                return _loss(rank, int(code), self._words.of(rank))
        return None

    def await_loss(self, seconds: float = GRACE) -> RankFailure | None:
        """`loss`, waited for: a connection can close before the process behind it has ended."""
        until = time.monotonic() + seconds
        while (loss := self.loss()) is None and self._words is not None and time.monotonic() < until:
            time.sleep(_POLL / 4)
        return loss

    def close(self, *, failed: bool) -> None:
        """Ends the watch and sees to it that the started ranks end: at once if this one failed, else in their time."""
        self._closed.set()
        if self._words is None:
            return
        until = time.monotonic() + (0.0 if failed else GRACE)
        for process in self.procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._end_children()
        if self._launches:
            self._words.remove()

    def _start_watch(self) -> None:
        threading.Thread(target=self._watch, name="watch over the ranks", daemon=True).start()

    def _watch(self) -> None:
        while self.loss() is None:
            if self._closed.wait(_POLL):
                return
        if self._closed.wait(GRACE):
            return
        loss = self.loss()
        try:
            if self.on_stuck is not None and loss is not None:
                self.on_stuck(loss)
        finally:
            self._end_children()
            if self._words is not None and self._launches:
                self._words.remove()
            # The main thread hangs where no exception reaches it.
            os._exit(RANK_LOST if loss is None else loss.exit_code)

    def _end_children(self) -> None:
        for process in self.procs:
            if process.poll() is None:
                process.kill()
                process.wait()


def _loss(rank: int, code: int, words: str | None) -> RankFailure:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return RankFailure(f"rank {rank} was killed by {names.get(-code, f'signal {-code}')}", RANK_LOST)
    return RankFailure(f"rank {rank} failed: {words}" if words else f"rank {rank} ended with exit code {code}", code)


class WatchedRanks(ParallelStrategy):
    """Mixin, named before the strategy that it is for: its ranks are started and watched by `WatchedLauncher`."""

    def _configure_launcher(self) -> None:
        if getattr(self, "_start_method", "popen") != "popen":
            # Forked and spawned ranks are watched by torch.multiprocessing.
            super()._configure_launcher()
            return
        assert self.cluster_environment is not None
        processes = len(self.parallel_devices or [])
        self._launcher = WatchedLauncher(self.cluster_environment, processes, getattr(self, "num_nodes", 1))
