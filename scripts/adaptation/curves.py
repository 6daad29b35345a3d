"""Learning-forgetting curves of runs, and their values at equal steps, equal seconds and equal learning."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkm_lightning.compare.bootstrap import interval

#: Columns of metrics.csv that a curve has, without their `val/`.
FIGURES = (
    *("learned_seen", "learned_paraphrase", "learned_question", "learned_composition", "learned_controls"),
    *("known_seen", "known_paraphrase", "known_question", "known_paraphrase_change", "known_loss", "known_loss_change"),
    *("known_kl", "bytes_changed"),
)
#: Before the names of scores on benchmarks, which only the last evaluation has.
BENCHMARK = "eval/"
#: By which learning is measured: prompts that were never learned.
LEARNED = "learned_paraphrase"
#: Share of B at which the forgetting of settings is compared: most methods reach it.
SHARE_LEARNED = 0.5
_RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Args:
        step: optimizer steps.
        seconds: that the processors have trained.
        wall: the same by the clock, which depends on what else the machine did.
        figures: by name; those that are missing are unknown.
    """

    step: float
    seconds: float
    wall: float
    figures: Mapping[str, float]

    def value(self, name: str) -> float:
        """Returns `step`, `seconds`, `wall`, `lost` or a figure."""
        if name in ("step", "seconds", "wall"):
            return float(getattr(self, name))
        return lost(self.figures) if name == "lost" else self.figures.get(name, math.nan)


def lost(figures: Mapping[str, float]) -> float:
    """Returns the share of A that is lost: of its recall, or where no recall is measured the rise of its perplexity."""
    change = figures.get("known_paraphrase_change", math.nan)
    before = figures.get("known_paraphrase", math.nan) - change
    if math.isfinite(before) and before > 0:
        return -change / before
    return math.expm1(figures.get("known_loss_change", math.nan))


def start_point(learned: Mapping[str, float], first: Point) -> Point:
    """Returns the point before training: what the starting model answers, nothing lost, nothing changed.

    Args:
        learned: shares of right answers by form.
        first: an evaluation, from which the figures of the start follow.
    """
    figures = dict.fromkeys(FIGURES, math.nan) | {f"learned_{form}": share for form, share in learned.items()}
    for name in ("known_paraphrase", "known_loss"):
        figures[name] = first.value(name) - first.value(f"{name}_change")
        figures[f"{name}_change"] = 0.0
    return Point(0, 0.0, 0.0, figures | {"known_kl": 0.0, "bytes_changed": 0.0})


def read_curve(metrics: Path) -> list[Point]:
    """Returns the evaluations of a run, from its metrics.csv."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/bytes_changed")]
    return [
        Point(float(row["step"]), float(row["val/cpu_seconds"]), float(row["seconds"]), _figures(row)) for row in rows
    ]


def _figures(row: Mapping[str, str]) -> dict[str, float]:
    benchmarks = {name: float(text) for name, text in row.items() if name.startswith(BENCHMARK) and text}
    return {name: _number(row.get(f"val/{name}")) for name in FIGURES} | benchmarks


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


def first_at(curve: Sequence[Point], axis: str, value: float) -> Point | None:
    """Returns the point at which the curve first reaches `value` on `axis`, between two evaluations by a straight line.

    None where it never does.
    """
    for before, after in itertools.pairwise(curve):
        low, high = before.value(axis), after.value(axis)
        if low >= value:
            return before
        if high >= value:
            return _between(before, after, (value - low) / (high - low))
    return curve[-1] if curve and curve[-1].value(axis) >= value else None


def _between(before: Point, after: Point, share: float) -> Point:
    def mixed(name: str) -> float:
        return (1 - share) * before.value(name) + share * after.value(name)

    # Not the benchmarks, which the earlier evaluation lacks.
    return Point(mixed("step"), mixed("seconds"), mixed("wall"), {name: mixed(name) for name in FIGURES})


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean over seeds and the ends of its interval, by resampling them; nan for the ends of one alone."""
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) == 0:
        return math.nan, math.nan, math.nan
    if len(known) == 1:
        return float(known[0]), math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(known), size=(_RESAMPLES, len(known)))
    return float(known.mean()), *interval(known[draws].mean(1))
