"""Quality over the course of a run, at its validations, and read off at an equal moment of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pkm_lightning.compare.costs import cost
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run

#: Columns of metrics.csv that a curve may be drawn against; `flops` as `active_flops`, of the trunk alone.
AXES = ("tokens", "seconds", "active_flops")


def curve(run: Run, column: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Abscissa and value of every row that has `column`."""
    rows = [row for row in run.rows if column in row]
    if axis == "active_flops":
        x = [row["tokens"] * cost(run, "trunk_flops_train") for row in rows]
    else:
        x = [row[axis] for row in rows]
    return np.array(x, dtype=np.float64), np.array([row[column] for row in rows], dtype=np.float64)


def read_off(run: Run, quality: Quality, axis: str, at: float) -> float:
    """Quality at a point of a run, linearly between validations; at its end for a run that ended before.

    nan before the first validation, and without any.
    """
    x, y = curve(run, quality.curve, axis)
    if not len(x) or at < x[0]:
        return math.nan
    return float(np.interp(at, x, y))


def mean_curve(runs: Sequence[Run], column: str, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Abscissa, mean, least and greatest value over the runs of an arm, at the validations that all of them have."""
    curves = [curve(run, column, axis) for run in runs]
    n = min((len(x) for x, _ in curves), default=0)
    if not n:
        empty = np.array([])
        return empty, empty, empty, empty
    x_SN = np.stack([x[:n] for x, _ in curves])
    y_SN = np.stack([y[:n] for _, y in curves])
    return x_SN.mean(0), y_SN.mean(0), y_SN.min(0), y_SN.max(0)
