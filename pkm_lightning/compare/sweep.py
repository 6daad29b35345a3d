"""Which learning rate a sweep has found best for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from pkm_lightning.compare.metric import higher_is_better, value_in
from pkm_lightning.compare.plan import PlannedRun
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.errors import ConfigError


def choose_rates(
    runs: Sequence[PlannedRun], sweep: SweepSettings
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """The mean of the metric over seeds by arm and rate (None where a run failed), and each arm's best rate.

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
            best = max if higher_is_better(sweep.metric) else min
            chosen[arm] = best(finite, key=lambda rate: finite[rate])
    return results, chosen


def check_swept(run: PlannedRun, sweep: SweepSettings) -> None:
    """Refuses a metric that a finished run of the sweep does not have.

    Raises:
        ConfigError: naming those that it has.
    """
    record = read_record(run.folder)
    metrics = record.get("metrics") or {}
    key = f"test/{sweep.metric}" if higher_is_better(sweep.metric) else sweep.metric
    if record.get("status") == "finished" and key not in metrics:
        names = ", ".join(sorted(name.removeprefix("test/") for name in metrics if name.startswith("test/")))
        raise ConfigError(f"sweep.metric={sweep.metric} is a figure of no run; its runs have: {names}.")


def _value(run: PlannedRun, metric: str) -> float:
    record = read_record(run.folder)
    return value_in(record.get("metrics") or {}, metric) if record.get("status") == "finished" else math.nan
