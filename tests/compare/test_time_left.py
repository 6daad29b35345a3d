"""The estimate of the time left, against runs whose lengths are known because a clock of the test runs them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkm_lightning.compare.schedule import ScheduledRun
from pkm_lightning.compare.time_left import TimeLeft, in_words

#: Seconds per step, seconds beside training, and steps of runs as unequal as those of a comparison of FFNs.
VARIANTS = {
    "dense": (0.10, 8.0, 1000),
    "dense_4x": (0.35, 12.0, 1000),
    "moe": (0.2, 9.0, 2000),
    "pkm": (0.15, 20.0, 600),
}
WEIGHTS = {"dense": 1.0, "dense_4x": 4.0, "moe": 1.75, "pkm": 1.75}
STEPS = {name: steps for name, (_, _, steps) in VARIANTS.items()}
START, VALIDATIONS = 2.0, 5


class Machine:
    """Runs that take the time of `VARIANTS`, give or take 10%, on a clock that jumps from event to event."""

    def __init__(self, out: Path, jobs: int, seeds: int = 3, shrink: int = 1) -> None:
        self.steps = {name: steps // shrink for name, steps in STEPS.items()}
        self.now, self._jobs, self._random = 0.0, jobs, random.Random(0)
        self.runs = [
            ScheduledRun(name, seed, None, (), out / "runs" / name / f"seed-{seed}")
            for seed in range(1, seeds + 1)
            for name in VARIANTS
        ]
        self.time_left = TimeLeft(jobs=jobs, weights=WEIGHTS, clock=lambda: self.now)
        self._ended: set[str] = set()
        self.all_ended_once = 0.0

    def estimates(self) -> Iterator[tuple[float, float | None]]:
        """Runs all; yields the time and the estimate after each line of progress and each end."""
        waiting, running = list(self.runs), []
        while waiting or running:
            while waiting and len(running) < self._jobs:
                run = waiting.pop(0)
                self.time_left.start(run)
                events = self._events(run)
                running.append((next(events), run, events))
            running.sort(key=lambda entry: entry[0])
            self.now, run, events = running.pop(0)
            if (at := next(events, None)) is None:
                self.time_left.end(run)
                if len(self._ended | {run.variant}) > len(self._ended):
                    self._ended, self.all_ended_once = self._ended | {run.variant}, self.now
                self.now += 1.0  # the report is written
            else:
                running.append((at, run, events))
            yield self.now, self.time_left.seconds()

    def _events(self, run: ScheduledRun) -> Iterator[float]:
        """Yields when the files of a run change, which they do when the next event is asked for."""
        (rate, rest, _), steps, began = VARIANTS[run.variant], self.steps[run.variant], self.now
        luck = self._random.uniform(0.9, 1.1)
        rate, rest, rows, spent = rate * luck, rest * luck, [], START
        run.folder.mkdir(parents=True, exist_ok=True)
        for step in range(50, steps + 1, 50):
            validated = step * VALIDATIONS // steps - (step - 50) * VALIDATIONS // steps
            spent += validated * (rest - START) / (VALIDATIONS + 1)
            yield began + step * rate + spent
            rows.append({"step": step, "tokens": 100 * step, "seconds": step * rate, "train/loss": 1.0})
            with (run.folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        yield began + steps * rate + rest
        seconds = {"train": steps * rate, "total": steps * rate + rest - 1}
        (run.folder / "run.json").write_text(json.dumps({"status": "finished", "seconds": seconds}))


def true_to(share: float, pairs: list[tuple[float, float | None]], end: float) -> float:
    """Returns the share of the moments at which the estimate is within `share` of what was really left."""
    known = [(at, left) for at, left in pairs if end - at > 5]
    return sum(left is not None and abs(left - (end - at)) <= share * (end - at) for at, left in known) / len(known)


@pytest.mark.parametrize(("jobs", "shrink"), [(1, 1), (2, 1), (3, 1), (2, 20)])
def test_unequal_runs_are_foretold_to_30_percent(tmp_path: Path, jobs: int, shrink: int) -> None:
    """Training is most of the long runs; of the short ones, start and test are."""
    machine = Machine(tmp_path, jobs, shrink=shrink)
    machine.time_left.plan(machine.runs, machine.steps)
    assert machine.time_left.seconds() is None
    pairs = list(machine.estimates())
    end = pairs[-1][0]
    assert pairs[-1][1] == 0.0
    first = next(i for i, (at, _) in enumerate(pairs) if at > machine.all_ended_once)
    assert true_to(0.3, pairs[first:], end) == 1.0
    # Before, what has not run is taken from the others.
    assert true_to(0.5, pairs[2:first], end) == 1.0


def test_a_continued_comparison_is_foretold_from_the_runs_that_it_has(tmp_path: Path) -> None:
    earlier = Machine(tmp_path, 1, seeds=1)
    earlier.time_left.plan(earlier.runs, STEPS)
    list(earlier.estimates())
    machine = Machine(tmp_path, 1, seeds=3)
    machine.runs = machine.runs[4:]
    machine.time_left.plan(machine.runs, STEPS)
    machine.time_left.learn(earlier.runs, STEPS)
    before = machine.time_left.seconds()
    pairs = list(machine.estimates())
    assert true_to(0.3, [(0.0, before), *pairs], pairs[-1][0]) == 1.0


def test_variants_that_are_left_out_take_no_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1)
    machine.time_left.plan(machine.runs, STEPS)
    machine.time_left.later = 100.0
    machine.time_left.drop(list(VARIANTS))
    assert machine.time_left.seconds() == 100.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (95, "2 min"), (5300, "88 min"), (7800, "2 h 10 min"), (2.6e5, "3 d 0 h")],
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
