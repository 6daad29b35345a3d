"""Which learning rate a sweep has found best for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from pkm_lightning.compare.plan import PlannedRun
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.compare.settings import SweepSettings


def choose_rates(
    runs: Sequence[PlannedRun], sweep: SweepSettings
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """The mean of the metric over seeds by arm and rate (None where a run failed), and each arm's rate with the lowest.

    An arm without any finite mean has no rate.
    """
    results: dict[str, dict[str, float | None]] = {}
    chosen: dict[str, float] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        means: dict[float, float] = {}
        for rate in sweep.learning_rates:
            values = [_value(run, sweep.metric) for run in runs if run.arm == arm and run.learning_rate == rate]
            means[rate] = fmean(values)
        results[arm] = {f"{rate:g}": value if math.isfinite(value) else None for rate, value in means.items()}
        finite = {rate: value for rate, value in means.items() if math.isfinite(value)}
        if finite:
            chosen[arm] = min(finite, key=lambda rate: finite[rate])
    return results, chosen


def _value(run: PlannedRun, metric: str) -> float:
    record = read_record(run.folder)
    value = (record.get("metrics") or {}).get(metric) if record.get("status") == "finished" else None
    return math.nan if value is None else float(value)
