"""Quality over the course of a run, at its validations, and interpolated at a moment that all runs share.

Letters: R runs, P validations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pkm_lightning.compare.costs import cost
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run


def curve(run: Run, column: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns abscissa and value of every row of metrics.csv that has `column`.

    Args:
        run: a run.
        column: of metrics.csv.
        axis: `tokens`, `seconds`, or `active_flops`: training FLOPs of the trunk.
    """
    rows = [row for row in run.rows if column in row]
    if axis == "active_flops":
        x = [row["tokens"] * cost(run, "trunk_flops_train") for row in rows]
    else:
        x = [row[axis] for row in rows]
    return np.array(x, dtype=np.float64), np.array([row[column] for row in rows], dtype=np.float64)


def quality_at(run: Run, quality: Quality, axis: str, moment: float) -> float:
    """Interpolates quality at `moment` linearly between validations.

    A run that ended before keeps its last value; nan before the first validation, and without any.
    """
    x, y = curve(run, quality.curve, axis)
    if not len(x) or moment < x[0]:
        return math.nan
    return float(np.interp(moment, x, y))


def mean_curve(runs: Sequence[Run], column: str, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns abscissa, mean, least and greatest value over the runs of a variant (P each).

    Only the validations that all runs have count: a mean that loses a seed half-way would jump there.
    """
    curves = [curve(run, column, axis) for run in runs]
    n = min((len(x) for x, _ in curves), default=0)
    if not n:
        empty = np.array([])
        return empty, empty, empty, empty
    x_RP = np.stack([x[:n] for x, _ in curves])
    y_RP = np.stack([y[:n] for _, y in curves])
    return x_RP.mean(0), y_RP.mean(0), y_RP.min(0), y_RP.max(0)
