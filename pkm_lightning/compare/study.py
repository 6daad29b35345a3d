"""Everything that a report says, computed from runs: one object that tables and plots read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkm_lightning.compare.bootstrap import Resampled, plain_mean, resample
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.costs import compute, cost
from pkm_lightning.compare.differences import Difference, find_differences
from pkm_lightning.compare.multiplier import Multiplier, multipliers
from pkm_lightning.compare.quality import Quality, choose_quality
from pkm_lightning.compare.records import Run, read_runs
from pkm_lightning.compare.settings import ReportSettings

#: What compute is counted of.
BASES = ("trunk", "model")


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
        ladder: dense arms of one shape, by compute; empty if there are fewer than two.
        multipliers: by basis and arm; empty without a ladder.
        differences: in what the runs differ.
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
    def unfair(self) -> list[Difference]:
        """Differences that are not those of a comparison of FFNs."""
        return [difference for difference in self.differences if difference.kind == "other"]

    @property
    def is_equal_time(self) -> bool:
        """The runs were given equal seconds, not equal tokens."""
        return bool(self.comparisons) and all(comparison.seconds for comparison in self.comparisons)

    def mean_cost(self, arm: str, name: str) -> float:
        """The mean of a figure of `costs` over the arm's runs."""
        return plain_mean([cost(run, name) for run in self.arms[arm]])


def make_study(folders: Sequence[Path], settings: ReportSettings) -> Study:
    """Reads the runs under `folders` and evaluates them.

    Raises:
        RunDirectoryError: there are none.
        ConfigError: `report.metric` is a figure of none of them.
    """
    runs, comparisons = read_runs(folders)
    quality = choose_quality(settings.metric, runs)
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run.ok and math.isfinite(quality.value(run)):
            arms.setdefault(run.arm, []).append(run)
    resampled = resample(arms, quality, resamples=settings.resamples, seed=settings.seed) if arms else None
    ladder = _ladder(arms)
    found: dict[str, dict[str, Multiplier]] = {}
    for basis in BASES if len(ladder) > 1 and resampled is not None else ():
        spent = {arm: plain_mean([compute(run, basis) for run in own]) for arm, own in arms.items()}
        known = {arm: value for arm, value in spent.items() if math.isfinite(value)}
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
        differences=find_differences(runs, comparisons),
        settings=settings,
    )


def _ladder(arms: dict[str, list[Run]]) -> list[str]:
    """Arms of nothing but dense FFNs, of the commonest number of layers and width, by compute, each compute once."""
    shapes: dict[tuple[object, object], dict[float, str]] = {}
    for arm, runs in arms.items():
        config = runs[0].config
        if runs[0].record.get("ffn") != "Dense" or config["placement"].get("mode") != "replace":
            continue
        shape = config["model"]["n_layers"], config["model"]["dim"]
        spent = compute(runs[0], "trunk")
        if math.isfinite(spent):
            shapes.setdefault(shape, {}).setdefault(spent, arm)
    rungs = max(shapes.values(), key=len, default={})
    return [rungs[spent] for spent in sorted(rungs)] if len(rungs) > 1 else []


def _reference(arms: dict[str, list[Run]], ladder: Sequence[str]) -> str | None:
    """The dense arm whose compute is nearest to that of the others, else the first arm."""
    dense = list(ladder) or [arm for arm, runs in arms.items() if runs[0].record.get("ffn") == "Dense"]
    others = [compute(runs[0], "trunk") for arm, runs in arms.items() if arm not in dense]
    known = sorted(value for value in others if math.isfinite(value))
    if not dense:
        return next(iter(arms), None)
    if not known:
        return dense[0]
    middle = known[len(known) // 2]
    return min(dense, key=lambda arm: abs(math.log(compute(arms[arm][0], "trunk") / middle)))
