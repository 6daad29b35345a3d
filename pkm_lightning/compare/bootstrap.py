"""Confidence intervals: a paired bootstrap over facts and seeds.

Each resample draws the seeds with replacement, and the facts too; variants that were trained with the same seeds, or
asked the same questions, get the same draws of them. The difference between two variants therefore varies less than
each of them. With few seeds the interval is too narrow: of three, resampling sees two thirds of the variance. Drawing
both counts the noise of single answers up to three times (Owen 2007, "The pigeonhole bootstrap").

Letters: R runs of a variant, one per seed, F facts, Q resamples, X runs or facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run

#: Share of the resamples that an interval holds.
COVERAGE = 0.95
# Draws of facts in memory at a time.
_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Resampled:
    """Means of each variant, over its runs and in each resample.

    Args:
        mean: by variant, over its seeds.
        resamples: by variant, Q values; resample q of variants with the same seeds and facts has the same draws.
        is_paired: all variants have the same seeds and facts.
        over: what was resampled, in words.
    """

    mean: dict[str, float]
    resamples: dict[str, np.ndarray]
    is_paired: bool
    over: str

    def interval(self, variant: str) -> tuple[float, float]:
        """Returns the interval of the variant's mean."""
        return interval(self.resamples[variant])

    def difference(self, variant: str, reference: str) -> tuple[float, float, float]:
        """Returns the mean difference to `reference` and the ends of its interval."""
        low, high = interval(self.resamples[variant] - self.resamples[reference])
        return self.mean[variant] - self.mean[reference], low, high


def interval(values_Q: np.ndarray) -> tuple[float, float]:
    """Returns the percentile interval of resampled values; nan if one of them is nan."""
    low, high = np.quantile(values_Q, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def resample(variants: Mapping[str, Sequence[Run]], quality: Quality, *, resamples: int, seed: int) -> Resampled:
    """Resamples the runs of every variant.

    Args:
        variants: finished runs by variant, at least one each.
        quality: the metric that is averaged.
        resamples: Q.
        seed: decides the draws; the same seed and runs give the same intervals.
    """
    values = {name: _values(runs, quality) for name, runs in variants.items()}
    shapes = {values_RF.shape for values_RF in values.values()}
    # What variants have in common is drawn once for all of them: equal seeds, equal facts.
    seeds = {name: tuple(sorted(run.seed for run in runs)) for name, runs in variants.items()}
    facts = {
        name: (values[name].shape[1], *dict.fromkeys(quality.prompts(run) for run in runs))
        for name, runs in variants.items()
    }
    rng = np.random.default_rng(seed)
    means: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    # Draws of all resamples at once would take gigabytes for many facts.
    block = max(1, _DRAWS_AT_ONCE // max(n_facts for _, n_facts in shapes))
    for start in range(0, resamples, block):
        n_resamples = min(block, resamples - start)
        shares: dict[object, np.ndarray] = {}
        for name, values_RF in values.items():
            for group, size in zip((seeds[name], facts[name]), values_RF.shape, strict=True):
                if group not in shares:
                    shares[group] = _draws(rng, size, n_resamples)
            means[name].append(_means(values_RF, shares[seeds[name]], shares[facts[name]]))
    return Resampled(
        mean={name: float(values_RF.mean()) for name, values_RF in values.items()},
        # A single value contains nothing about its own spread.
        resamples={
            name: np.concatenate(blocks) if values[name].size > 1 else np.full(resamples, np.nan)
            for name, blocks in means.items()
        },
        is_paired=len(set(seeds.values())) == len(set(facts.values())) == 1,
        over=_over(shapes),
    )


def _over(shapes: set[tuple[int, ...]]) -> str:
    words = ["facts"] * any(n_facts > 1 for _, n_facts in shapes)
    words += ["seeds"] * any(n_seeds > 1 for n_seeds, _ in shapes)
    return " and ".join(words)


def _values(runs: Sequence[Run], quality: Quality) -> np.ndarray:
    """Returns the metric of each seed and fact (R, F); F is 1 where the metric is no mean over facts."""
    ordered = sorted(runs, key=lambda run: run.seed)
    per_fact = [values for run in ordered if (values := quality.per_fact(run)) is not None]
    if len(per_fact) == len(ordered) and len({values.shape for values in per_fact}) == 1:
        return np.stack(per_fact)
    return np.array([[quality.value(run)] for run in ordered])


def _draws(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """Draws how often each of `size` seeds or facts occurs in each resample (Q, X), as shares that add up to 1."""
    shares_QX: np.ndarray = rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size
    return shares_QX


def _means(values_RF: np.ndarray, seeds_QR: np.ndarray, facts_QF: np.ndarray) -> np.ndarray:
    """Returns the mean in each resample (Q)."""
    means_Q: np.ndarray = np.einsum("qr,qr->q", seeds_QR, facts_QF @ values_RF.T)
    return means_Q


def finite_mean(values: Sequence[float]) -> float:
    """Returns the mean of the finite values, or nan if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
