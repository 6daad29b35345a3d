"""The evaluation of a comparison: one object, computed from runs, that tables and plots read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkm_lightning.compare.bootstrap import Resampled, finite_mean, resample
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.costs import BASES, cost, training_cost
from pkm_lightning.compare.differences import (
    LENGTHS,
    Difference,
    equal_seconds,
    find_differences,
    find_differences_of_sweep,
    varied_keys,
)
from pkm_lightning.compare.leaves import portable_leaves
from pkm_lightning.compare.limits import Limits, find_limits
from pkm_lightning.compare.multiplier import Multiplier, multipliers
from pkm_lightning.compare.quality import Quality, choose_quality
from pkm_lightning.compare.records import Run, read_runs, read_swept
from pkm_lightning.compare.settings import ReportSettings

# Share by which costs may differ that count as equal: `match=` solves for a whole number.
_EQUAL_COST = 0.05


@dataclass(frozen=True, kw_only=True)
class Study:
    """An evaluated comparison.

    Args:
        runs: all runs, in the order of the variants.
        variants: the runs with results, by variant; variants without any are missing.
        comparisons: the comparisons that the runs belong to, where `compare` started them.
        quality: the metric that the report is about.
        resampled: its means and resamples by variant; None without a finished run.
        reference: the variant that others are compared with.
        ladder: dense variants of one shape, by compute; empty if there are fewer than two, or all had equal seconds.
        multipliers: by basis and variant; empty without a ladder.
        limits: variants at the ceiling or the floor of the metric.
        differences: keys in which the runs differ.
        settings: settings of the report.
    """

    runs: list[Run]
    variants: dict[str, list[Run]]
    comparisons: list[Comparison]
    quality: Quality
    resampled: Resampled | None
    reference: str | None
    ladder: list[str]
    multipliers: dict[str, dict[str, Multiplier]]
    limits: Limits
    differences: list[Difference]
    settings: ReportSettings

    @property
    def failed(self) -> list[Run]:
        """Runs without results."""
        return [run for run in self.runs if not run.ok]

    @property
    def is_unequal_length(self) -> bool:
        """The runs should have equal tokens, or equal seconds, and do not."""
        return any(difference.key in LENGTHS for difference in self.unfair)

    @property
    def unfair(self) -> list[Difference]:
        """Differences that a comparison of FFNs must not have."""
        return [difference for difference in self.differences if difference.kind == "other"]

    @property
    def n_planned(self) -> int:
        """Number of runs that the comparisons will have, as far as known, and of runs without a comparison."""
        planned = {
            (variant, seed)
            for comparison in self.comparisons
            for variant in comparison.variants
            for seed in comparison.seeds
        }
        return len(planned | {(run.variant, run.seed) for run in self.runs})

    @property
    def is_equal_time(self) -> bool:
        """The runs had a budget of seconds, not of tokens."""
        return equal_seconds(self.runs, self.comparisons) is not None

    @property
    def candidates(self) -> list[str]:
        """The variants that the comparison is between: without the larger and smaller dense models of the ladder."""
        outside = [variant for variant in self.variants if variant not in self.ladder or variant == self.reference]
        return outside if len(outside) > 1 else list(self.variants)

    def is_equal(self, name: str, variants: Iterable[str] | None = None) -> bool | None:
        """Returns whether the variants agree in one of `costs.FIGURES`; None where one of them has no such figure.

        Args:
            name: of the figure.
            variants: all by default.
        """
        values = [self.mean_cost(variant, name) for variant in (self.variants if variants is None else variants)]
        if not values or not all(map(math.isfinite, values)):
            return None
        return max(values) <= (1 + _EQUAL_COST) * min(values)

    def varies(self, name: str) -> bool:
        """Returns whether one of `costs.FIGURES` differs between the variants that have it."""
        values = [self.mean_cost(variant, name) for variant in self.variants]
        known = [value for value in values if math.isfinite(value) and value > 0]
        return bool(known) and max(known) > (1 + _EQUAL_COST) * min(known)

    def mean_cost(self, variant: str, name: str) -> float:
        """Returns the mean of one of `costs.FIGURES` over the variant's runs."""
        return finite_mean([cost(run, name) for run in self.variants[variant]])

    def training_cost(self, variant: str, basis: str) -> float:
        """Returns the mean cost of a training over the variant's runs; see `costs.training_cost`."""
        return _mean_training_cost(self.variants[variant], basis)

    def bits_stored(self, variant: str) -> tuple[float, float]:
        """Returns bits of knowledge per fact and in total over the facts of training; nan where either is unknown."""
        bits = Quality("bits_paraphrase")
        bits_per_fact = finite_mean([bits.value(run) for run in self.variants[variant]])
        return bits_per_fact, bits_per_fact * self.mean_cost(variant, "facts")


def make_study(folders: Sequence[Path], settings: ReportSettings) -> Study:
    """Reads the runs under `folders` and evaluates them.

    Raises:
        RunDirectoryError: there are no runs.
        ConfigError: no run has the metric of `report.metric`.
    """
    runs, comparisons = read_runs(folders)
    quality = choose_quality(settings.metric, runs)
    runs = [_checked(run, quality) for run in runs]
    variants: dict[str, list[Run]] = {}
    for run in runs:
        if run.ok:
            variants.setdefault(run.variant, []).append(run)
    draws = {"resamples": settings.resamples, "seed": settings.seed}
    resampled = resample(variants, quality, **draws) if variants else None
    # At equal seconds larger models train on fewer tokens: that is no ladder of compute.
    ladder = _ladder(variants) if equal_seconds(runs, comparisons) is None else []
    differences = find_differences(runs, comparisons, varied_keys(folders))
    by_basis: dict[str, dict[str, Multiplier]] = {}
    for basis in BASES if ladder else ():
        costs = {variant: _mean_training_cost(of_variant, basis) for variant, of_variant in variants.items()}
        known = {variant: value for variant, value in costs.items() if math.isfinite(value)}
        if not known.keys() >= set(ladder):  # only processor seconds may be missing, of runs of several processes
            continue
        assert resampled is not None
        by_basis[basis] = multipliers(resampled, ladder, known, higher_is_better=quality.higher_is_better)
    return Study(
        runs=runs,
        variants=variants,
        comparisons=comparisons,
        quality=quality,
        resampled=resampled,
        reference=_reference(variants, ladder),
        ladder=ladder,
        multipliers=by_basis,
        limits=find_limits(variants, quality, resampled, **draws) if resampled else Limits(),
        differences=[*differences, *find_differences_of_sweep(runs, read_swept(folders), comparisons, differences)],
        settings=settings,
    )


def _mean_training_cost(runs: Sequence[Run], basis: str) -> float:
    return finite_mean([training_cost(run, basis) for run in runs])


def _checked(run: Run, quality: Quality) -> Run:
    """Returns the run, marked as failed if it lacks the metric of the report."""
    is_lacking = run.ok and not math.isfinite(quality.value(run))
    return replace(run, failure=f"finished without {quality.metric}") if is_lacking else run


def _ladder(variants: Mapping[str, list[Run]]) -> list[str]:
    """Returns dense variants that differ only in hidden dimension, one per compute; two or more, or none."""
    families: dict[str, dict[float, str]] = {}
    for variant, runs in variants.items():
        flops = training_cost(runs[0], "trunk")
        if runs[0].is_dense and math.isfinite(flops) and flops > 0:
            families.setdefault(_family(runs[0]), {}).setdefault(flops, variant)
    rungs = max(families.values(), key=len, default={})
    return [rungs[flops] for flops in sorted(rungs)] if len(rungs) > 1 else []


def _family(run: Run) -> str:
    """Returns a text that is equal for runs that differ only in FFN size, seed and learning rate.

    The learning rate is left out because a sweep may choose another one for each size.
    """
    ignored = ("seed", "data.order_seed", "optim.lr", "match", "match_budget", "ffn.hidden_dim")
    return repr(sorted((key, value) for key, value in portable_leaves(run.config).items() if key not in ignored))


def _reference(variants: Mapping[str, list[Run]], ladder: Sequence[str]) -> str | None:
    """Returns the dense variant whose compute is nearest to that of the others, or else the first variant."""
    flops = {variant: training_cost(runs[0], "trunk") for variant, runs in variants.items()}
    known = {variant: value for variant, value in flops.items() if math.isfinite(value) and value > 0}
    dense = list(ladder) or [variant for variant in known if variants[variant][0].is_dense]
    others = sorted(value for variant, value in known.items() if variant not in dense)
    if not dense or not others:
        return next(iter(dense or variants), None)
    middle = others[len(others) // 2]
    return min(dense, key=lambda variant: abs(math.log(known[variant] / middle)))
