"""Everything that a report says, computed from runs: one object that tables and plots read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkm_lightning.compare.bootstrap import Resampled, plain_mean, resample
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.costs import BASES, cost, spent
from pkm_lightning.compare.differences import (
    LENGTHS,
    Difference,
    equal_seconds,
    find_differences,
    find_differences_of_sweep,
)
from pkm_lightning.compare.leaves import portable_leaves
from pkm_lightning.compare.multiplier import Multiplier, multipliers
from pkm_lightning.compare.quality import Quality, choose_quality
from pkm_lightning.compare.records import Run, read_runs, read_swept
from pkm_lightning.compare.settings import ReportSettings


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison, evaluated.

    Args:
        runs: all runs, in the order of the arms.
        arms: the runs with figures, by arm; arms without any are missing.
        comparisons: what wrote them, where it was `compare`.
        quality: the figure that the report is about.
        resampled: its means and resamples by arm; None without a finished run.
        reference: the arm that others are compared with.
        ladder: dense arms of one shape, by compute; empty if there are fewer than two, or all had equal seconds.
        multipliers: by basis and arm; empty without a ladder.
        differences: in what the runs differ.
        settings: of the report.
    """

    runs: list[Run]
    arms: dict[str, list[Run]]
    comparisons: list[Comparison]
    quality: Quality
    resampled: Resampled | None
    reference: str | None
    ladder: list[str]
    multipliers: dict[str, dict[str, Multiplier]]
    differences: list[Difference]
    settings: ReportSettings

    @property
    def failed(self) -> list[Run]:
        """Runs without figures."""
        return [run for run in self.runs if not run.ok]

    @property
    def is_unequal_length(self) -> bool:
        """The runs were to have equal tokens, or seconds, and have not."""
        return any(difference.key in LENGTHS for difference in self.unfair)

    @property
    def unfair(self) -> list[Difference]:
        """Differences that are not those of a comparison of FFNs."""
        return [difference for difference in self.differences if difference.kind == "other"]

    @property
    def n_planned(self) -> int:
        """Runs that the comparisons are to have, as far as they are known, and those without a comparison."""
        planned = {
            (arm, seed) for comparison in self.comparisons for arm in comparison.arms for seed in comparison.seeds
        }
        return len(planned | {(run.arm, run.seed) for run in self.runs})

    @property
    def is_equal_time(self) -> bool:
        """The runs were given equal seconds, not equal tokens."""
        return equal_seconds(self.runs, self.comparisons) is not None

    def mean_cost(self, arm: str, name: str) -> float:
        """The mean of a figure of `costs` over the arm's runs."""
        return plain_mean([cost(run, name) for run in self.arms[arm]])

    def spent(self, arm: str, basis: str) -> float:
        """What a training of the arm took, the mean over its runs; see `costs.spent`."""
        return _mean_spent(self.arms[arm], basis)

    def bits_stored(self, arm: str) -> tuple[float, float]:
        """Bits of knowledge about a fact, and about all facts of training; nan where questions or facts are unknown."""
        bits = Quality("bits_paraphrase")
        a_fact = plain_mean([bits.value(run) for run in self.arms[arm]])
        return a_fact, a_fact * self.mean_cost(arm, "facts")


def make_study(folders: Sequence[Path], settings: ReportSettings) -> Study:
    """Reads the runs under `folders` and evaluates them.

    Raises:
        RunDirectoryError: there are none.
        ConfigError: `report.metric` is a figure of none of them.
    """
    runs, comparisons = read_runs(folders)
    quality = choose_quality(settings.metric, runs)
    runs = [_judged(run, quality) for run in runs]
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run.ok:
            arms.setdefault(run.arm, []).append(run)
    resampled = resample(arms, quality, resamples=settings.resamples, seed=settings.seed) if arms else None
    # Of equal seconds larger models get fewer tokens: no ladder of compute.
    ladder = _ladder(arms) if equal_seconds(runs, comparisons) is None else []
    differences = find_differences(runs, comparisons)
    found: dict[str, dict[str, Multiplier]] = {}
    for basis in BASES if ladder else ():
        took = {arm: _mean_spent(own, basis) for arm, own in arms.items()}
        known = {arm: value for arm, value in took.items() if math.isfinite(value)}
        assert resampled is not None
        found[basis] = multipliers(resampled, ladder, known, higher_is_better=quality.higher_is_better)
    return Study(
        runs=runs,
        arms=arms,
        comparisons=comparisons,
        quality=quality,
        resampled=resampled,
        reference=_reference(arms, ladder),
        ladder=ladder,
        multipliers=found,
        differences=[*differences, *find_differences_of_sweep(runs, read_swept(folders), comparisons, differences)],
        settings=settings,
    )


def _mean_spent(runs: Sequence[Run], basis: str) -> float:
    return plain_mean([spent(run, basis) for run in runs])


def _judged(run: Run, quality: Quality) -> Run:
    """The run; without the figure that the report is about it has failed."""
    lacks = run.ok and not math.isfinite(quality.value(run))
    return replace(run, failure=f"finished without {quality.metric}") if lacks else run


def _ladder(arms: Mapping[str, list[Run]]) -> list[str]:
    """Dense arms that differ in nothing but their hidden dimension, each compute once; two or more, or none."""
    alike: dict[str, dict[float, str]] = {}
    for arm, runs in arms.items():
        flops = spent(runs[0], "trunk")
        if runs[0].record.get("ffn") == "Dense" and math.isfinite(flops) and flops > 0:
            alike.setdefault(_but_for_its_size(runs[0]), {}).setdefault(flops, arm)
    rungs = max(alike.values(), key=len, default={})
    return [rungs[flops] for flops in sorted(rungs)] if len(rungs) > 1 else []


def _but_for_its_size(run: Run) -> str:
    """What a run is, but for the size of its FFN, its seed and its learning rate, which is each model's own."""
    kept = {
        key: value
        for key, value in portable_leaves(run.config).items()
        if key not in ("seed", "data.order_seed", "optim.lr", "match", "match_budget", "ffn.hidden_dim")
    }
    return repr(sorted(kept.items()))


def _reference(arms: Mapping[str, list[Run]], ladder: Sequence[str]) -> str | None:
    """The dense arm whose compute is nearest to that of the others, else the first arm."""
    flops = {arm: spent(runs[0], "trunk") for arm, runs in arms.items()}
    known = {arm: value for arm, value in flops.items() if math.isfinite(value) and value > 0}
    dense = list(ladder) or [arm for arm in known if arms[arm][0].record.get("ffn") == "Dense"]
    others = sorted(value for arm, value in known.items() if arm not in dense)
    if not dense or not others:
        return next(iter(dense or arms), None)
    middle = others[len(others) // 2]
    return min(dense, key=lambda arm: abs(math.log(known[arm] / middle)))
