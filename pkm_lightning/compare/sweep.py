"""A sweep of learning rates: its runs, and the rate that was best for each variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pkm_lightning.compare.metric import higher_is_better
from pkm_lightning.compare.overrides import last_of_each
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.compare.schedule import ScheduledRun, Variant
from pkm_lightning.compare.settings import SweepSettings


def schedule_sweep(
    variants: Sequence[Variant], sweep: SweepSettings, base: Sequence[str], out: Path, draws: Mapping[str, int]
) -> list[ScheduledRun]:
    """Returns the runs of a sweep: the same rates and seeds for every variant.

    Args:
        variants: what is compared.
        sweep: rates and seeds.
        base: overrides of all variants.
        out: the comparison's directory.
        draws: `data.draw` of the reported runs by variant, for data that have that key.
    """
    runs = []
    for rate in sweep.learning_rates:
        for seed in sweep.seeds:
            for variant in variants:
                name = variant.name
                # Other subjects: rates chosen on the reported ones would be tuned on what they report.
                data = (f"data.draw={draws[name] + sweep.draw}",) if name in draws else ()
                chosen_by = f"objective={sweep.metric}"
                overrides = last_of_each(
                    (*base, *variant.overrides, *data, f"optim.lr={rate!r}", f"seed={seed}", chosen_by)
                )
                folder = out / "sweep" / name / f"lr-{rate:g}" / f"seed-{seed}"
                runs.append(ScheduledRun(name, seed, rate, overrides, folder))
    return runs


def choose_rates(
    runs: Sequence[ScheduledRun], sweep: SweepSettings
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """Returns the mean of the metric over seeds by variant and rate (None where a run failed), and the best rates.

    A variant without any finite mean has no best rate.
    """
    results: dict[str, dict[str, float | None]] = {}
    best_rates: dict[str, float] = {}
    for variant in dict.fromkeys(run.variant for run in runs):
        means: dict[float, float] = {}
        for rate in sweep.learning_rates:
            # One failed seed makes the mean nan: a rate that diverges now and then must not win by its lucky seeds.
            values = [_value(run, sweep.metric) for run in runs if (run.variant, run.learning_rate) == (variant, rate)]
            means[rate] = fmean(values)
        results[variant] = {f"{rate:g}": value if math.isfinite(value) else None for rate, value in means.items()}
        finite = {rate: value for rate, value in means.items() if math.isfinite(value)}
        if finite:
            best = max if higher_is_better(sweep.metric) else min
            best_rates[variant] = best(finite, key=lambda rate: finite[rate])
    return results, best_rates


def _value(run: ScheduledRun, metric: str) -> float:
    """Returns the metric at the last validation of a finished run; nan without one."""
    record = read_record(run.folder)
    objective = record.get("objective") or {}
    # JSON has no NaN: null stands for a figure that was not finite.
    is_known = record.get("status") == "finished" and objective.get("name") == metric
    return float(objective["value"]) if is_known and objective.get("value") is not None else math.nan
