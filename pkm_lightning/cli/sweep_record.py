"""What the runs of a sweep came to: a table at its end, the same as sweep.csv in its folder, and the best run."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from pkm_lightning.compare.metric import LOWER_IS_BETTER, higher_is_better
from pkm_lightning.compare.overrides import key_of, quoted
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.storage import csv_line, write_beside

NAME = "sweep.csv"
_FIXED = ("run", "status", "objective", "value", "step", "seconds", "best", "reason")
#: Set by `-m` itself.
_OWN_KEYS = ("run_dir", "objective", "objective_mode", "sweep_dir")


@dataclass(frozen=True)
class JobFailure:
    """The end of a job that did not succeed: what to print, and the exit code."""

    message: str
    exit_code: int


@dataclass
class Trial:
    """A run of a sweep.

    Args:
        folder: its run directory.
        overrides: value by key of its command line.
        failure: why its command was refused or its run failed; empty if it did not.
        record: content of run.json, once the sweep has ended.
    """

    folder: Path
    overrides: dict[str, str]
    failure: str = ""
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """That of run.json, `diverged` for a last validation without a finite value, or `refused`."""
        status = str(self.record.get("status") or "refused")
        if self.failure and status in ("finished", "pruned"):  # of an earlier command in the same folder
            return "refused"
        if status == "finished" and not math.isfinite(self.value):
            return "diverged"
        return "interrupted" if status == "running" else status

    @property
    def value(self) -> float:
        """The objective at the last validation; nan without one."""
        value = (self.record.get("objective") or {}).get("value")
        return math.nan if value is None else float(value)

    @property
    def reason(self) -> str:
        """Why the run did not finish, in one line."""
        return " ".join((self.failure or str(self.record.get("reason") or "")).split())


_trials: ContextVar[list[Trial] | None] = ContextVar("trials of the sweep under way", default=None)


@contextlib.contextmanager
def recorded_trials() -> Iterator[list[Trial]]:
    """Yields the list of the trials that start in the block."""
    trials: list[Trial] = []
    token = _trials.set(trials)
    try:
        yield trials
    finally:
        _trials.reset(token)


def note_trial(folder: Path, overrides: Sequence[str]) -> None:
    """Adds a trial, which starts now, to those of the sweep under way."""
    if (trials := _trials.get()) is not None:
        values = {key_of(override): override.partition("=")[2] for override in overrides}
        trials.append(Trial(folder, {key: value for key, value in values.items() if key not in _OWN_KEYS}))


def note_failure(failures: list[JobFailure], failure: JobFailure) -> None:
    """Adds `failure` to those of the command, and to the trial under way where there is a sweep."""
    failures.append(failure)
    if trials := _trials.get():
        trials[-1].failure = failure.message


def show_sweep(trials: Sequence[Trial], folder: Path) -> None:
    """Prints the table of a sweep and writes sweep.csv into its `folder`, unless all of its runs were refused."""
    for trial in trials:
        trial.record = read_record(trial.folder)
    if all(trial.status == "refused" for trial in trials):
        return
    best = best_trial(trials)
    keys = varying_keys(trials)
    lines = [csv_line([*_FIXED, *keys])]
    lines += [csv_line(_cells(trial, folder, keys, trial is best)) for trial in trials]
    write_beside(folder / NAME, "".join(lines))
    _print_table(trials, folder, keys, best)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Returns the finished trial with the best objective; None without one."""
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        return None
    choose = max if finished[0].record["objective"]["mode"] == "max" else min
    return choose(finished, key=lambda trial: trial.value)


def varying_keys(trials: Sequence[Trial]) -> list[str]:
    """Returns the keys in which the command lines of the trials differ, in their order; all of a single trial."""
    keys = dict.fromkeys(key for trial in trials for key in trial.overrides)
    return [key for key in keys if len(trials) == 1 or len({trial.overrides.get(key) for trial in trials}) > 1]


def _cells(trial: Trial, folder: Path, keys: Sequence[str], is_best: bool) -> list[Any]:
    objective = trial.record.get("objective") or {}
    return [
        _name(trial, folder),
        trial.status,
        objective.get("name", ""),
        "" if math.isnan(trial.value) else trial.value,
        objective.get("step", ""),
        (trial.record.get("seconds") or {}).get("total", ""),
        int(is_best),
        trial.reason,
        *(trial.overrides.get(key, "") for key in keys),
    ]


def _name(trial: Trial, folder: Path) -> str:
    return str(trial.folder.relative_to(folder)) if trial.folder.is_relative_to(folder) else str(trial.folder)


def _print_table(trials: Sequence[Trial], folder: Path, keys: Sequence[str], best: Trial | None) -> None:
    name = next((t.record["objective"]["name"] for t in trials if t.record.get("objective")), "objective")
    rows = [["run", *keys, name, "step", "seconds", "status"]]
    for trial in trials:
        seconds = (trial.record.get("seconds") or {}).get("total")
        rows.append([
            _name(trial, folder),
            *(_short(trial.overrides.get(key, "")) for key in keys),
            "-" if math.isnan(trial.value) else f"{trial.value:.4f}" + " *" * (trial is best),
            str((trial.record.get("objective") or {}).get("step", "-")),
            "-" if seconds is None else f"{seconds:.1f}",
_status(trial),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"table: {folder / NAME}")
    if best is None:
        print("no run finished with a finite value", file=sys.stderr)
        return
    is_known = name in LOWER_IS_BETTER or higher_is_better(name)
    arguments = [f"runs=[{_path(folder)}]", f"out={_path(folder / 'report')}"]
    arguments += [f"report.metric={name}"] if is_known else []
    print(f"best: run {_name(best, folder)}, {name} {best.value:.4f}")
    print(f"report: python -m pkm_lightning report {shlex.join(arguments)}")
    if best.record.get("own_test") is False:
        print("The test reads what validations read: test figures of the best run are those it was chosen by.")


def _path(path: Path) -> str:
    """Returns a path as Hydra reads it: other characters than these need quotes."""
    return str(path) if re.fullmatch(r"[A-Za-z0-9_./-]+", str(path)) else quoted(str(path))


def _status(trial: Trial) -> str:
    """Returns status and, where there is no more to see in the row, the reason."""
    shows_reason = trial.reason and trial.status in ("refused", "failed")
    return f"{trial.status}: {shorten(trial.reason, 100)}" if shows_reason else trial.status


def _short(value: str) -> str:
    """Returns a number with four digits and other values as they are: samplers draw numbers with seventeen."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value
