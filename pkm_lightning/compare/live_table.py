"""What a comparison shows while it runs: a table that redraws itself on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pkm_lightning.compare.plan import PlannedRun
from pkm_lightning.compare.processes import Ended
from pkm_lightning.compare.run_state import Progress, read_progress, read_record

_STYLES = {"finished": "green", "running": "yellow", "failed": "red", "diverged": "red", "interrupted": "magenta"}
#: Seconds between redraws: each reads the metrics of what runs.
_REDRAW = 2.0


class LiveTable:
    """A context manager.

    Args:
        runs: those of the table, in its order.
        steps: of each arm.
        title: above the table.
    """

    def __init__(self, runs: Sequence[PlannedRun], steps: Mapping[str, int], title: str) -> None:
        self._runs, self._steps, self._title = list(runs), steps, title
        self._console = Console()
        self._is_live = sys.stdout.isatty()
        self._live = Live(console=self._console, auto_refresh=False) if self._is_live else None
        self._status = {run.folder: _status(run) for run in runs}
        self._progress: dict[Path, Progress] = {}
        self._drawn = 0.0

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

    def running(self, runs: Sequence[PlannedRun]) -> None:
        """These run now."""
        for run in runs:
            if self._status[run.folder] != "running":
                self._status[run.folder] = "running"
                self._say(f"{run.label}: started")
        if self._live and time.monotonic() - self._drawn > _REDRAW:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def ended(self, end: Ended) -> None:
        """This run has ended."""
        self._progress.pop(end.run.folder, None)
        status = _status(end.run)
        self._status[end.run.folder] = "failed" if end.exit_code and status not in ("finished", "diverged") else status
        self._say(f"{end.run.label}: {self._status[end.run.folder]}{self._words(end)}")

    def _words(self, end: Ended) -> str:
        record = read_record(end.run.folder)
        if record.get("status") == "finished":
            loss = (record.get("metrics") or {}).get("test/loss")
            return f" in {record['seconds']['train']:,.0f} s" + ("" if loss is None else f", test loss {loss:.4f}")
        return f": {end.words}"

    def _say(self, line: str) -> None:
        if not self._is_live:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        done = sum(status == "finished" for status in self._status.values())
        table = Table(title=f"{self._title}: {done} of {len(self._runs)} finished")
        for column in ("run", "status"):
            table.add_column(column)
        for column in ("step", "loss", "tokens/s"):
            table.add_column(column, justify="right")
        # A terminal shows the first lines of what is too long for it: what runs stands first.
        for run in sorted(self._runs, key=lambda run: self._status[run.folder] != "running"):
            status = self._status[run.folder]
            seen = self._seen(run, status)
            steps = f"{seen.step:,} / {self._steps[run.arm]:,}" if seen else f"{self._steps[run.arm]:,}"
            style = _STYLES.get(status, "")
            table.add_row(
                run.label,
                f"[{style}]{status}[/{style}]" if style else "waiting" if status == "absent" else status,
                steps,
                f"{seen.loss:.4f}" if seen else "",
                f"{seen.tokens_per_second:,.0f}" if seen else "",
            )
        return table

    def _seen(self, run: PlannedRun, status: str) -> Progress | None:
        """How far a run is; that of a run that does not run is read once."""
        if status == "running" or (status != "absent" and run.folder not in self._progress):
            found = read_progress(run.folder)
            if found is not None:
                self._progress[run.folder] = found
        return self._progress.get(run.folder)


def _status(run: PlannedRun) -> str:
    record = read_record(run.folder)
    status = record.get("status", "absent")
    if status == "finished" and (record.get("metrics") or {}).get("test/loss", 0.0) is None:
        return "diverged"
    return "interrupted" if status == "running" else str(status)
