"""What a comparison shows while it runs: a table that redraws itself on a terminal, one line per event elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.run_state import Progress, read_progress, read_record
from pkm_lightning.compare.schedule import ScheduledRun
from pkm_lightning.compare.time_left import TimeLeft, in_words

_STYLES = {"finished": "green", "running": "yellow", "failed": "red", "diverged": "red", "interrupted": "magenta"}
# Seconds between redraws: each reads the metrics of every running run.
_REDRAW = 2.0


class LiveTable:
    """Context manager that shows the progress of runs.

    Args:
        runs: the rows of the table, in its order.
        steps: optimizer steps by variant.
        title: shown above the table.
        time_left: estimates what is shown as the time left of the comparison.
    """

    def __init__(self, runs: Sequence[ScheduledRun], steps: Mapping[str, int], title: str, time_left: TimeLeft) -> None:
        self._runs, self._steps, self._title, self._time_left = list(runs), steps, title, time_left
        self._console = Console(markup=False, emoji=False)
        self._is_live = sys.stdout.isatty()
        self._live = Live(console=self._console, auto_refresh=False) if self._is_live else None
        self._status = {run.folder: _status(run) for run in runs}
        self._progress: dict[Path, Progress] = {}
        self._redrawn_at = 0.0
        self._has_shown_time = False

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        else:
            self._console.print(f"{self._title}: {len(self._runs)} runs", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def show_running(self, runs: Sequence[ScheduledRun]) -> None:
        """Marks these runs as running and redraws the table from time to time."""
        for run in runs:
            if self._status[run.folder] != "running":
                self._status[run.folder] = "running"
                self._print_line(f"{run.label}: started")
        if time.monotonic() - self._redrawn_at > _REDRAW:
            self._redrawn_at = time.monotonic()
            if self._live:
                self._live.update(self._table(), refresh=True)
            elif not self._has_shown_time and (left := self._left()):
                self._print_line(left)

    def show_end(self, end: RunEnd) -> None:
        """Shows how a run ended."""
        self._progress.pop(end.run.folder, None)
        status = _status(end.run)
        # A run that was killed left "running" or nothing in its record.
        self._status[end.run.folder] = "failed" if end.exit_code and status not in ("finished", "diverged") else status
        left = self._left()
        self._print_line(
            f"{end.run.label}: {self._status[end.run.folder]}{self._summary(end)}{'; ' if left else ''}{left}"
        )

    def _summary(self, end: RunEnd) -> str:
        record = read_record(end.run.folder)
        if record.get("status") == "finished":
            loss = (record.get("metrics") or {}).get("test/loss")
            return f" in {record['seconds']['train']:,.0f} s" + ("" if loss is None else f", test loss {loss:.4f}")
        return f": {end.reason}"

    def _left(self) -> str:
        """Returns the time left in words; empty while it is not known, and when nothing is left."""
        seconds = self._time_left.seconds()
        self._has_shown_time = self._has_shown_time or bool(seconds)
        return f"about {in_words(seconds)} left" if seconds else ""

    def _print_line(self, line: str) -> None:
        if not self._is_live:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        n_finished = sum(status == "finished" for status in self._status.values())
        left = self._left()
        table = Table(title=f"{self._title}: {n_finished} of {len(self._runs)} finished{', ' if left else ''}{left}")
        for column in ("run", "status"):
            table.add_column(column)
        for column in ("step", "loss", "tokens/s"):
            table.add_column(column, justify="right")
        # A terminal cuts off the end of a table that is too long: running runs come first.
        for run in sorted(self._runs, key=lambda run: self._status[run.folder] != "running"):
            status = self._status[run.folder]
            progress = self._read_progress(run, status)
            steps = f"{progress.step:,} / {self._steps[run.variant]:,}" if progress else f"{self._steps[run.variant]:,}"
            style = _STYLES.get(status, "")
            table.add_row(
                run.label,
                Text("waiting" if status == "absent" else status, style=style),
                steps,
                f"{progress.loss:.4f}" if progress else "",
                f"{progress.tokens_per_second:,.0f}" if progress else "",
            )
        return table

    def _read_progress(self, run: ScheduledRun, status: str) -> Progress | None:
        """Returns the progress of a run; for a run that is not running it is read once."""
        if status == "running" or (status != "absent" and run.folder not in self._progress):
            progress = read_progress(run.folder)
            if progress is not None:
                self._progress[run.folder] = progress
        return self._progress.get(run.folder)


def shown_runs(
    runs: Sequence[ScheduledRun],
    to_start: Sequence[ScheduledRun],
    steps: Mapping[str, int],
    title: str,
    processes: Processes,
    time_left: TimeLeft,
) -> Generator[RunEnd, None, None]:
    """Runs `to_start`, shows the progress of all `runs`, and yields each end.

    Args:
        runs: the rows of the table, in its order.
        to_start: those that are started.
        steps: optimizer steps by variant.
        title: shown above the table.
        processes: where they run.
        time_left: has them planned.
    """
    started: set[Path] = set()
    with LiveTable(runs, steps, title, time_left) as table:

        def tick(running: list[ScheduledRun]) -> None:
            for run in running:
                if run.folder not in started:
                    started.add(run.folder)
                    time_left.start(run)
            table.show_running(running)

        with contextlib.closing(processes.run(to_start, tick)) as ends:
            for end in ends:
                time_left.end(end.run)
                table.show_end(end)
                yield end


def _status(run: ScheduledRun) -> str:
    record = read_record(run.folder)
    status = record.get("status", "absent")
    # JSON has no NaN: null stands for a loss that was not finite.
    if status == "finished" and (record.get("metrics") or {}).get("test/loss", 0.0) is None:
        return "diverged"
    return "interrupted" if status == "running" else str(status)
