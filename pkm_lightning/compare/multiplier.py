"""The compute multiplier: how many times a variant's compute a dense model needs to reach the same quality.

The dense models of a ladder give quality against compute. Between two rungs quality is interpolated in the logarithm of
compute. A rung that is worse than a smaller one counts as level with it: what is asked is the least compute that has
reached a quality. A variant above all rungs has a multiplier of at least the last rung's compute over its own, one
below the first of at most that rung's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.bootstrap import COVERAGE, Resampled


@dataclass(frozen=True)
class Bound:
    """A multiplier, or what it is at least (`>=`) or at most (`<=`)."""

    value: float
    sign: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.sign + ' ' if self.sign else ''}{self.value:.2f}x"


@dataclass(frozen=True)
class Multiplier:
    """Of one variant, with the interval over resamples."""

    value: Bound
    low: Bound
    high: Bound


def multiplier(ladder: Sequence[tuple[float, float]], quality: float, compute: float) -> Bound:
    """Dense compute for `quality`, over `compute`.

    Args:
        ladder: compute and quality of two dense models or more; the higher quality is the better, and where two
            rungs are level the smaller one counts.
        quality: of the variant.
        compute: of the variant, in the unit of the ladder.
    """
    if math.isnan(quality) or any(math.isnan(value) for _, value in ladder):
        return Bound(math.nan)
    rungs = sorted(ladder)
    logs = np.log([rung for rung, _ in rungs])
    reached = np.maximum.accumulate([value for _, value in rungs])
    if quality > reached[-1]:
        return Bound(math.exp(logs[-1]) / compute, ">=")
    if quality < reached[0]:
        return Bound(math.exp(logs[0]) / compute, "<=")
    upper = int(np.searchsorted(reached, quality, side="left"))
    if upper == 0 and reached[1] == quality:
        # The least rungs are level: smaller models might do as well.
        return Bound(math.exp(logs[0]) / compute, "<=")
    if upper == 0 or reached[upper] == quality:
        return Bound(math.exp(logs[upper]) / compute)
    share = (quality - reached[upper - 1]) / (reached[upper] - reached[upper - 1])
    return Bound(math.exp(logs[upper - 1] + share * (logs[upper] - logs[upper - 1])) / compute)


def multipliers(
    resampled: Resampled, ladder: Sequence[str], compute: Mapping[str, float], *, higher_is_better: bool
) -> dict[str, Multiplier]:
    """The multiplier of every arm that is no rung of the ladder, with its interval over the resamples.

    Args:
        resampled: quality of all arms.
        ladder: the arms that are dense models of one shape, two or more.
        compute: of every arm, for one run.
    """
    sign = 1.0 if higher_is_better else -1.0
    found = {}
    for arm in resampled.mean:
        if arm in ladder or not compute.get(arm):
            continue
        point = multiplier(
            [(compute[r], sign * resampled.mean[r]) for r in ladder], sign * resampled.mean[arm], compute[arm]
        )
        drawn = [
            multiplier(list(zip([compute[r] for r in ladder], rungs, strict=True)), own, compute[arm])
            for *rungs, own in zip(
                *(sign * resampled.resamples[r] for r in ladder), sign * resampled.resamples[arm], strict=True
            )
        ]
        low, high = _quantiles(drawn)
        found[arm] = Multiplier(point, low, high)
    return found


def _quantiles(drawn: Sequence[Bound]) -> tuple[Bound, Bound]:
    """Bounds are ordered by value; `<=` stands before and `>=` behind what is known to be that value."""
    rank = {"<=": 0, "": 1, ">=": 2}
    ordered = sorted(drawn, key=lambda bound: (bound.value, rank[bound.sign]))
    last = len(ordered) - 1
    low, high = (round(last * share) for share in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))
    return ordered[low], ordered[high]
