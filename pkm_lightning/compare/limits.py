"""Variants at the ceiling or the floor of a metric, where differences between them say nothing.

At the ceiling nearly every answer is right. At the floor a variant recalls no more of what it was trained on than of
subjects that it was never shown: the interval of the difference between the two includes 0. Bits have a floor only,
losses neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pkm_lightning.compare.bootstrap import Resampled, interval, resample
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run

#: A share from which on too few wrong answers are left to compare.
CEILING = 0.95


@dataclass(frozen=True)
class Limits:
    """Variants whose quality is at a limit of the metric.

    Args:
        ceiling: variants with `CEILING` or more.
        floor: the quality on subjects never trained, chance, by variant that is not separated from it.
    """

    ceiling: tuple[str, ...] = ()
    floor: dict[str, float] = field(default_factory=dict)


def find_limits(
    variants: Mapping[str, Sequence[Run]], quality: Quality, resampled: Resampled, *, resamples: int, seed: int
) -> Limits:
    """Finds the variants at a limit.

    Args:
        variants: finished runs by variant.
        quality: the metric.
        resampled: its means and resamples.
        resamples, seed: of the bootstrap, see `bootstrap.resample`; subjects never trained get draws of their own.
    """
    ceiling = [name for name in variants if quality.is_share and resampled.mean[name] >= CEILING]
    control, floor = quality.control, {}
    known = {
        name: runs
        for name, runs in variants.items()
        if control is not None and all(math.isfinite(control.value(run)) for run in runs)
    }
    if control is not None and known:
        chance = resample(known, control, resamples=resamples, seed=seed + 1)
        for name in known:
            difference = resampled.resamples[name] - chance.resamples[name]
            if np.isfinite(difference).all() and interval(difference)[0] <= 0:
                floor[name] = chance.mean[name]
    return Limits(tuple(ceiling), floor)
