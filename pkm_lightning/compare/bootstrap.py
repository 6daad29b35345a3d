"""How far figures could have come out otherwise: a paired bootstrap over facts and seeds.

In each resample the seeds are drawn with replacement, and so are the facts; arms that were trained with the same seeds,
or asked the same questions, get the same draws of them. So a difference between two arms varies less than each of
them. Few seeds understate how seeds differ: of three, resampling sees two thirds of the variance. Drawing both
overstates what is noise of a single answer, up to three times its variance (Owen 2007, "The pigeonhole bootstrap").

Letters: A arms, S seeds, F facts, R resamples.
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
#: Draws of facts that are held at a time.
_DRAWN_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Resampled:
    """Means of each arm, and the same in each resample.

    Args:
        mean: by arm, over its seeds.
        resamples: by arm, R values; resample r of arms with the same seeds and facts is of the same draws.
        is_paired: all arms have the same seeds and facts.
        over: what was resampled, in words.
    """

    mean: dict[str, float]
    resamples: dict[str, np.ndarray]
    is_paired: bool
    over: str

    def interval(self, arm: str) -> tuple[float, float]:
        """Of the arm's mean."""
        return interval(self.resamples[arm])

    def difference(self, arm: str, reference: str) -> tuple[float, float, float]:
        """Mean difference to `reference` and its interval."""
        low, high = interval(self.resamples[arm] - self.resamples[reference])
        return self.mean[arm] - self.mean[reference], low, high


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values; nan if one of them is."""
    low, high = np.quantile(values_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def resample(arms: Mapping[str, Sequence[Run]], quality: Quality, *, resamples: int, seed: int) -> Resampled:
    """Resamples the runs of every arm.

    Args:
        arms: finished runs by arm, at least one each.
        quality: what is averaged.
        resamples: R.
        seed: of the draws; the same seed and runs give the same figures.
    """
    values = {arm: _values(runs, quality) for arm, runs in arms.items()}
    shapes = {values_SF.shape for values_SF in values.values()}
    # What is drawn once for all arms that have it: their seeds, their facts.
    seeds = {arm: tuple(sorted(run.seed for run in runs)) for arm, runs in arms.items()}
    facts = {
        arm: (values[arm].shape[1], *dict.fromkeys(quality.prompts(run) for run in runs)) for arm, runs in arms.items()
    }
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    block = max(1, _DRAWN_AT_ONCE // max(n_facts for _, n_facts in shapes))
    for start in range(0, resamples, block):
        n_drawn = min(block, resamples - start)
        shares: dict[object, np.ndarray] = {}
        for arm, values_SF in values.items():
            for own, n in zip((seeds[arm], facts[arm]), values_SF.shape, strict=True):
                if own not in shares:
                    shares[own] = _draws(rng, n, n_drawn)
            drawn[arm].append(_means(values_SF, shares[seeds[arm]], shares[facts[arm]]))
    return Resampled(
        mean={arm: float(values_SF.mean()) for arm, values_SF in values.items()},
        # Of one value nothing is known of how it could have come out.
        resamples={
            arm: np.concatenate(blocks) if values[arm].size > 1 else np.full(resamples, np.nan)
            for arm, blocks in drawn.items()
        },
        is_paired=len(set(seeds.values())) == len(set(facts.values())) == 1,
        over=_over(shapes),
    )


def _over(shapes: set[tuple[int, ...]]) -> str:
    words = ["facts"] * any(n_facts > 1 for _, n_facts in shapes) + ["seeds"] * any(
        n_seeds > 1 for n_seeds, _ in shapes
    )
    return " and ".join(words)


def _values(runs: Sequence[Run], quality: Quality) -> np.ndarray:
    """(S, F): the figure of each seed and fact; F is 1 where the figure is no mean over facts."""
    ordered = sorted(runs, key=lambda run: run.seed)
    of_facts = [values for run in ordered if (values := quality.of_facts(run)) is not None]
    if len(of_facts) == len(ordered) and len({values.shape for values in of_facts}) == 1:
        return np.stack(of_facts)
    return np.array([[quality.value(run)] for run in ordered])


def _draws(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often each of n seeds, or facts, is drawn in each resample (R, n), as shares that add up to 1."""
    drawn_RN: np.ndarray = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    return drawn_RN


def _means(values_SF: np.ndarray, seeds_RS: np.ndarray, facts_RF: np.ndarray) -> np.ndarray:
    """The mean in each resample (R)."""
    means_R: np.ndarray = np.einsum("rs,rs->r", seeds_RS, facts_RF @ values_SF.T)
    return means_R


def plain_mean(values: Sequence[float]) -> float:
    """The mean of the finite values, nan without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
