"""A sweep of learning rates: its runs, and the rate that was best for each variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pkm_lightning.compare.metric import higher_is_better, metric_value
from pkm_lightning.compare.overrides import last_of_each
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.compare.schedule import ScheduledRun, Variant
from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.errors import ConfigError


def schedule_sweep(
    variants: Sequence[Variant], sweep: SweepSettings, base: Sequence[str], out: Path, data_seeds: Mapping[str, int]
) -> list[ScheduledRun]:
    """Returns the runs of a sweep: the same rates and seeds for every variant.

    Args:
        variants: what is compared.
        sweep: rates and seeds.
        base: overrides of all variants.
        out: the comparison's directory.
        data_seeds: `data.seed` of the reported runs by variant, for data that have one.
    """
    runs = []
    for rate in sweep.learning_rates:
        for seed in sweep.seeds:
            for variant in variants:
                name = variant.name
                # Another draw of the data: rates chosen on the reported data would be tuned on what they report.
                data = (f"data.seed={data_seeds[name] + sweep.data_seed}",) if name in data_seeds else ()
                overrides = last_of_each((*base, *variant.overrides, *data, f"optim.lr={rate!r}", f"seed={seed}"))
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


def check_swept(run: ScheduledRun, sweep: SweepSettings) -> None:
    """Refuses a metric that a finished run of the sweep does not have.

    Raises:
        ConfigError: naming the metrics that it has.
    """
    record = read_record(run.folder)
    metrics = record.get("metrics") or {}
    key = f"test/{sweep.metric}" if higher_is_better(sweep.metric) else sweep.metric
    if record.get("status") == "finished" and key not in metrics:
        names = ", ".join(sorted(name.removeprefix("test/") for name in metrics if name.startswith("test/")))
        raise ConfigError(f"sweep.metric={sweep.metric} is a metric of no run; its runs have: {names}.")


def _value(run: ScheduledRun, metric: str) -> float:
    record = read_record(run.folder)
    return metric_value(record.get("metrics") or {}, metric) if record.get("status") == "finished" else math.nan
