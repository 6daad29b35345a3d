"""The time that a comparison still takes, estimated from what its runs took so far.

The wall time of a run is that of its training, which grows with its steps, and the rest: its start, validations, test.
Both are measured per variant. Of a variant that has not run yet, the training is taken from the others in proportion to
`weights`, and the rest is their mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from pathlib import Path
from statistics import fmean

from pkm_lightning.compare.run_state import read_progress, read_record
from pkm_lightning.compare.schedule import ScheduledRun

#: Share of its steps from which on a run's own speed counts instead of that of earlier runs of its variant.
_SETTLED = 0.2


@dataclass
class _Run:
    """A run until its end: its variant, its steps, and when it was started and with how much done before."""

    variant: str
    steps: int
    is_short: bool
    started: float | None = None
    trained_before: float = 0.0


@dataclass(frozen=True)
class _State:
    """How far a running run has come: steps, seconds of training, and seconds beside it since its start."""

    run: _Run
    step: int
    trained: float
    spent: float

    @property
    def rate(self) -> float:
        return self.trained / self.step

    @property
    def done(self) -> float:
        return self.step / self.run.steps

    @property
    def is_settled(self) -> bool:
        return self.done >= _SETTLED


class TimeLeft:
    """Estimator of the seconds until all planned runs have ended.

    Args:
        jobs: runs at a time.
        weights: expected seconds per step by variant, in any unit; a variant without one counts as their mean.
        clock: returns the time in seconds.

    Attributes:
        later: seconds of runs that cannot be planned yet.
    """

    def __init__(
        self, *, jobs: int, weights: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._jobs, self._weights, self._clock = jobs, dict(weights or {}), clock
        self.later = 0.0
        self._runs: dict[Path, _Run] = {}
        self._rates: dict[str, list[float]] = {}
        # Short runs ask no questions, so they have less beside training.
        self._rests: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
        # From the end of a run to the start of the next one in its place: reports are written then.
        self._gaps: list[float] = []
        self._ends: list[float] = []

    def plan(self, runs: Sequence[ScheduledRun], steps: Mapping[str, int], *, is_short: bool = False) -> None:
        """Sets the runs of a stage that will be started, in this order; those that are planned already keep theirs.

        Args:
            runs: to be started.
            steps: optimizer steps of each variant's runs.
            is_short: whether they only measure speed.
        """
        for run in runs:
            self._runs.setdefault(run.folder, _Run(run.variant, 0, is_short)).steps = steps[run.variant]

    def learn(self, runs: Sequence[ScheduledRun], steps: Mapping[str, int]) -> None:
        """Reads what runs took that an earlier command has finished, of the steps of each variant's runs."""
        for run in runs:
            train, total = _seconds_of(run.folder)
            if train is not None and total is not None:
                self._measure(_Run(run.variant, steps[run.variant], False), train, total - train)

    def start(self, run: ScheduledRun) -> None:
        """Records that a planned run was started."""
        entry, progress = self._runs[run.folder], read_progress(run.folder)
        entry.started, entry.trained_before = self._clock(), progress.seconds if progress else 0.0
        if self._ends:
            self._gaps.append(entry.started - self._ends.pop(0))

    def end(self, run: ScheduledRun) -> None:
        """Records that a run has ended, and what it took if it has finished."""
        entry = self._runs.pop(run.folder)
        self._ends.append(self._clock())
        train, _ = _seconds_of(run.folder)
        if train is not None and entry.started is not None:
            self._measure(entry, train, self._ends[-1] - entry.started - (train - entry.trained_before))

    def drop(self, variants: Sequence[str]) -> None:
        """Forgets the runs of variants that will not be started."""
        self._runs = {folder: run for folder, run in self._runs.items() if run.variant not in variants}

    def seconds(self) -> float | None:
        """Returns the seconds left; 0 if nothing is left, None as long as no run has shown a speed."""
        if not self._runs:
            return self.later
        running = {folder: self._state(folder, run) for folder, run in self._runs.items() if run.started is not None}
        rates = {variant: fmean(values) for variant, values in self._rates.items()}
        for state in running.values():
            if state.step:
                rates.setdefault(state.run.variant, state.rate)
        if not rates:
            return None
        gap = fmean(self._gaps) if self._gaps else 0.0
        slots = [self._left(state, rates, running.values()) for state in running.values()]
        slots += [0.0] * (self._jobs - len(slots))
        heapify(slots)
        for folder, run in self._runs.items():
            if folder not in running:
                whole = self._rate(run.variant, rates) * run.steps + self._rest(run, running.values())
                heapreplace(slots, slots[0] + gap + whole)
        return max(slots) + gap + self.later

    def _state(self, folder: Path, run: _Run) -> _State:
        assert run.started is not None
        progress = read_progress(folder)
        step, trained = (progress.step, progress.seconds) if progress else (0, run.trained_before)
        return _State(run, step, trained, self._clock() - run.started - (trained - run.trained_before))

    def _measure(self, run: _Run, train: float, rest: float) -> None:
        self._rates.setdefault(run.variant, []).append(train / max(1, run.steps))
        self._rests[run.is_short].setdefault(run.variant, []).append(max(0.0, rest))

    def _rate(self, variant: str, rates: Mapping[str, float]) -> float:
        """Returns the seconds per step of a variant: measured, or those of the others in proportion to the weights."""
        if variant in rates:
            return rates[variant]
        mean = fmean(self._weights.values()) if self._weights else 1.0
        scale = fmean(rate / self._weights.get(name, mean) for name, rate in rates.items())
        return scale * self._weights.get(variant, mean)

    def _rest(self, run: _Run, running: Iterable[_State]) -> float:
        """Returns the seconds beside training of a run: measured, or as far as the running ones show them."""
        rests = self._rests[run.is_short]
        if run.variant in rests:
            return fmean(rests[run.variant])
        if rests:
            return fmean(map(fmean, rests.values()))
        # At first the start is all of it, later validations are most of it.
        return max((state.spent / state.done if state.is_settled else state.spent for state in running), default=0.0)

    def _left(self, state: _State, rates: Mapping[str, float], running: Iterable[_State]) -> float:
        """Returns the seconds that a running run still takes."""
        rate = state.rate if state.is_settled else self._rate(state.run.variant, rates)
        # What has been trained since the last line of progress is in `spent`, and its steps are among those left.
        return max(0.0, (state.run.steps - state.step) * rate + self._rest(state.run, running) - state.spent)


def _seconds_of(folder: Path) -> tuple[float | None, float | None]:
    """Returns the training and total seconds of a finished run; None of others."""
    record = read_record(folder)
    seconds = record.get("seconds")
    if record.get("status") != "finished" or not isinstance(seconds, dict):
        return None, None
    train, total = seconds.get("train"), seconds.get("total")
    return (train if isinstance(train, int | float) else None), (total if isinstance(total, int | float) else None)


def in_words(seconds: float) -> str:
    """Returns a duration in one or two units: `40 s`, `14 min`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 36 else f"{hours // 24} d {hours % 24} h"
