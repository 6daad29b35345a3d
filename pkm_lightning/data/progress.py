"""The progress of a long preparation: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pkm_lightning.data.heartbeat import Heartbeat

log = logging.getLogger(__name__)


class BuildProgress:
    """Bytes read, tokens per second and the time that is left, of work on files of a known size.

    Args:
        title: what is done, such as `tokenises data.path=books`.
        total: bytes of the files; 0 where it is unknown.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._heartbeat = Heartbeat()
        self._tokens = 0
        self._first: int | None = None
        # On standard error: the standard output may be read by a program.
        console = Console(stderr=True, markup=False, emoji=False)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=total or None, speed="")

    def __enter__(self) -> BuildProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, tokens: int) -> None:
        """Shows that `done` bytes of the files are read, and that `tokens` more tokens were made of them."""
        self._tokens += tokens
        # A resumed build has bytes behind it that this process has not read.
        self._first = done if self._first is None else self._first
        seconds = max(self._heartbeat.seconds, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, speed=f"{self._tokens / seconds:,.0f} tokens/s")
        elif self._heartbeat.is_due():
            log.info(
                "%s: %s, %.1f million tokens, %s tokens/s%s",
                self._title,
                f"{done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB" if self._total else "bytes unknown",
                self._tokens / 1e6,
                f"{self._tokens / seconds:,.0f}",
                self._time_left(done, seconds),
            )

    def _time_left(self, done: int, seconds: float) -> str:
        assert self._first is not None
        if not self._total or done <= self._first:
            return ""
        left = (self._total - done) * seconds / (done - self._first)
        return f", {left / 60:.0f} min left" if left > 120 else f", {left:.0f} s left"
