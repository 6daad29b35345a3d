"""Differences between all variants of a report, two at a time, with their intervals from the paired bootstrap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pkm_lightning.compare.bootstrap import COVERAGE, Resampled
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.table import Column, Table
from pkm_lightning.storage import csv_line

# The widest table that a page can show; of a larger comparison differences.csv has the rest.
_SHOWN = 20
# A longer name over a column would leave no room for the others.
_LONGEST_NAME = 20


@dataclass(frozen=True)
class Pair:
    """The mean of one variant minus that of another.

    Args:
        difference: in the unit of the metric, recall as a share.
        low, high: ends of the interval; nan where a single value has none.
    """

    difference: float
    low: float
    high: float

    @property
    def is_separated(self) -> bool:
        """The interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def has_interval(self) -> bool:
        """The resamples give an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def pair(resampled: Resampled, variant: str, other: str) -> Pair:
    """Returns the difference of `variant` from `other`."""
    return Pair(*resampled.difference(variant, other))


def best_first(study: Study) -> list[str]:
    """Returns the variants by their means, the best first."""
    assert study.resampled is not None
    sign = -1.0 if study.quality.higher_is_better else 1.0
    mean = study.resampled.mean
    return sorted(mean, key=lambda variant: sign * mean[variant])


def pair_table(study: Study) -> Table | None:
    """Returns every variant minus every other; None with fewer than two."""
    ordered = best_first(study)
    if len(ordered) < 2:
        return None
    shown = ordered[:_SHOWN]
    if study.reference in ordered[_SHOWN:]:
        shown[-1] = str(study.reference)
    is_named = max(map(len, shown)) <= _LONGEST_NAME
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    pale: set[tuple[int, int]] = set()
    for i, variant in enumerate(shown):
        cells = []
        for j, other in enumerate(shown):
            if i == j:
                cells.append("")
                continue
            difference = _of(study, variant, other)
            cells.append(study.quality.format_difference(difference.difference, difference.low, difference.high))
            (strong if difference.is_separated else pale).add((i, j + 1))
        rows.append([variant if is_named else f"{i + 1}: {variant}", *cells])
    headings = shown if is_named else [str(i + 1) for i in range(len(shown))]
    return Table(
        f"Differences between all variants{f', {study.quality.unit}' if study.quality.unit else ''}",
        _note(study, len(shown), len(ordered)),
        [Column("row minus column"), *map(Column, headings)],
        rows,
        strong=frozenset(strong),
        pale=frozenset(pale),
        is_narrow=True,
    )


def _note(study: Study, n_shown: int, n_variants: int) -> str:
    assert study.resampled is not None
    points = " in percentage points" if study.quality.unit == "points" else ""
    lead = f"{study.quality.label.capitalize()}: the mean of the row's variant minus that of the column's{points}, "
    if not any(_of(study, *two).has_interval for two in itertools.combinations(study.variants, 2)):
        return f"{lead}best first. With one seed and no questions no difference has an interval."
    n_pairs = n_variants * (n_variants - 1) // 2
    chance = n_pairs * (1 - COVERAGE)
    several = (
        f" Of {n_pairs} intervals about {chance:.0f} would exclude 0 if no variants differed: they are not widened for "
        "the number of pairs."
        if chance >= 0.5
        else ""
    )
    unpaired = "" if study.resampled.is_paired else " Where two variants lack common seeds or facts it is not paired."
    more = (
        f" The best {n_shown} of {n_variants} variants; differences.csv has all pairs." if n_shown < n_variants else ""
    )
    return (
        f"{lead}with the 95% interval of the paired bootstrap, best first. Bold: the interval excludes 0. Otherwise "
        f"the runs do not separate the two.{unpaired}{several}{more}"
    )


def pairs_csv(study: Study) -> str:
    """Returns the content of differences.csv: one row per pair of variants, recall as a share."""
    lines = [csv_line(("variant", "minus", "metric", "difference", "low", "high", "excludes_zero"))]
    lines += [csv_line(row) for row in _csv_rows(study)] if study.resampled is not None else []
    return "".join(lines)


def _csv_rows(study: Study) -> Iterator[tuple[object, ...]]:
    for other, variant in itertools.combinations(study.variants, 2):
        one = _of(study, variant, other)
        ends = (one.low, one.high, int(one.is_separated)) if one.has_interval else ("", "", "")
        yield (variant, other, study.quality.metric, one.difference, *ends)


def _of(study: Study, variant: str, other: str) -> Pair:
    assert study.resampled is not None
    return pair(study.resampled, variant, other)
