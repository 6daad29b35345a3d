"""The compute multiplier: how many times a variant's compute a dense model needs to reach the same quality.

The dense models of a ladder give quality as a function of compute. Between two rungs, quality is interpolated in the
logarithm of compute. A rung that is worse than a smaller one counts as level with it, because the multiplier is about
the least compute that reaches a quality. A variant above all rungs has at least the last rung's compute over its own; a
variant below the first rung at most that rung's.

Letters: Q resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.bootstrap import COVERAGE, Resampled


@dataclass(frozen=True)
class Bound:
    """A multiplier, or its lower (`>=`) or upper (`<=`) bound."""

    value: float
    sign: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.sign + ' ' if self.sign else ''}{self.value:.2f}x"


@dataclass(frozen=True)
class Multiplier:
    """The multiplier of one variant and the ends of its interval over resamples."""

    value: Bound
    low: Bound
    high: Bound

    @property
    def has_interval(self) -> bool:
        """The resamples give an interval."""
        return not math.isnan(self.low.value)


def multiplier(ladder: Sequence[tuple[float, float]], quality: float, compute: float) -> Bound:
    """Returns the dense compute for `quality`, divided by `compute`.

    Args:
        ladder: compute and quality of two or more dense models; higher quality is better, and of two level rungs the
            smaller one counts.
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
        # The first two rungs are level: an even smaller model might reach the same.
        return Bound(math.exp(logs[0]) / compute, "<=")
    if upper == 0 or reached[upper] == quality:
        return Bound(math.exp(logs[upper]) / compute)
    share = (quality - reached[upper - 1]) / (reached[upper] - reached[upper - 1])
    return Bound(math.exp(logs[upper - 1] + share * (logs[upper] - logs[upper - 1])) / compute)


def multipliers(
    resampled: Resampled, ladder: Sequence[str], compute: Mapping[str, float], *, higher_is_better: bool
) -> dict[str, Multiplier]:
    """Returns the multiplier of every variant outside the ladder, with its interval over the resamples.

    Args:
        resampled: quality of all variants.
        ladder: the variants that are dense models of one shape, two or more.
        compute: of one run of each variant; a variant without it has no multiplier.
        higher_is_better: whether quality rises or falls with better models.
    """
    sign = 1.0 if higher_is_better else -1.0
    result = {}
    for name in resampled.mean:
        if name in ladder or not compute.get(name):
            continue
        rungs = [compute[rung] for rung in ladder]
        point = multiplier(
            [(compute[rung], sign * resampled.mean[rung]) for rung in ladder],
            sign * resampled.mean[name],
            compute[name],
        )
        # The ladder is resampled together with the variant: its rungs are measured with the same noise.
        columns_Q = [sign * resampled.resamples[column] for column in (*ladder, name)]
        bounds = [
            multiplier(list(zip(rungs, qualities, strict=True)), quality, compute[name])
            for *qualities, quality in zip(*columns_Q, strict=True)
        ]
        low, high = _interval(bounds)
        result[name] = Multiplier(point, low, high)
    return result


def _interval(bounds: Sequence[Bound]) -> tuple[Bound, Bound]:
    """Returns the percentiles; `<=` sorts before, `>=` after the same value without a sign."""
    rank = {"<=": 0, "": 1, ">=": 2}
    ordered = sorted(bounds, key=lambda bound: (bound.value, rank[bound.sign]))
    last = len(ordered) - 1
    low, high = (round(last * share) for share in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))
    return ordered[low], ordered[high]
