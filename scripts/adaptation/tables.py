"""The rows of the report: every method at equal steps, equal seconds and equal learning, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from curves import LEARNED, SHARE_LEARNED, Point, first_at, spread
from methods import Method
from study import Study

#: What counts as equal learning: a figure, its share, and both in words.
LEVELS = (
    (LEARNED, SHARE_LEARNED, "50% of the paraphrases of B, which are never shown,"),
    (LEARNED, 0.8, "80% of the paraphrases of B, which are never shown,"),
    ("learned_seen", 0.8, "80% of the prompts of B that are shown"),
)
#: Figures of a table by their heading: name, factor, digits after the point.
COLUMNS: dict[str, tuple[str, float, int]] = {
    "B seen %": ("learned_seen", 100, 1),
    "B paraphrased %": (LEARNED, 100, 1),
    "B question %": ("learned_question", 100, 1),
    "two facts %": ("learned_composition", 100, 1),
    "A lost %": ("lost", 100, 1),
    "perplexity %": ("perplexity", 100, 2),
    "KL": ("known_kl", 1, 4),
    "steps": ("step", 1, 0),
    "CPU s": ("seconds", 1, 0),
    "wall s": ("wall", 1, 0),
    "MB changed": ("bytes_changed", 1e-6, 2),
}


@dataclass(frozen=True)
class Variant:
    """A method with or without old data, and its curves by seed; those of runs that are missing are empty."""

    method: Method
    replayed: bool
    curves: dict[int, list[Point]]

    @property
    def label(self) -> str:
        """The name in tables and plots."""
        return f"{self.method.label}, replay" if self.replayed else self.method.label

    @property
    def present(self) -> list[list[Point]]:
        """The curves of the runs that are finished."""
        return [curve for curve in self.curves.values() if curve]


def variants(study: Study) -> list[Variant]:
    """Returns all variants of a study with the runs that are finished."""
    return [
        Variant(method, replayed, {seed: study.curve(method, seed, replayed) for seed in study.seeds})
        for method, replayed in study.variants()
    ]


def figure(point: Point, name: str) -> float:
    """Returns a figure of a point; `perplexity` is its relative change on other text."""
    return math.expm1(point.value("known_loss_change")) if name == "perplexity" else point.value(name)


def table(chosen: Sequence[Variant], pick: Callable[[list[Point]], Point | None]) -> list[list[str]]:
    """Returns a row per variant: label, each figure of the picked points, and how many runs have such a point."""
    rows = []
    for variant in chosen:
        points = [point for curve in variant.present if (point := pick(curve)) is not None]
        cells = [cell([figure(p, name) * factor for p in points], digits) for name, factor, digits in COLUMNS.values()]
        rows.append([variant.label, *cells, f"{len(points)} of {len(variant.curves)}"])
    return rows


def cell(values: Sequence[float], digits: int) -> str:
    """Returns the mean over seeds and its interval as text; a dash where there is no value."""
    mean, low, high = spread(values)
    if not math.isfinite(mean):
        return "-"
    ends = f" ({low:z.{digits}f} to {high:z.{digits}f})" if math.isfinite(low) else ""
    return f"{mean:z.{digits}f}{ends}"


def equal_steps(study: Study, chosen: Sequence[Variant]) -> list[list[str]]:
    """Returns the figures at the end of all runs."""
    return table(chosen, lambda curve: first_at(curve, "step", study.plan.steps))


def shortest(chosen: Sequence[Variant]) -> float:
    """Returns the processor seconds of the fastest run; nan without a run."""
    return min((curve[-1].seconds for variant in chosen for curve in variant.present), default=math.nan)


def equal_seconds(chosen: Sequence[Variant]) -> list[list[str]]:
    """Returns the figures when the fastest run ended."""
    seconds = shortest(chosen)
    return table(chosen, lambda curve: first_at(curve, "seconds", seconds))


def equal_learning(chosen: Sequence[Variant], figure: str, share: float) -> list[list[str]]:
    """Returns the figures when a run first answered `share` of the prompts of `figure`, where it ever did."""
    return table(chosen, lambda curve: first_at(curve, figure, share))


def curve_rows(study: Study, chosen: Sequence[Variant]) -> Iterator[dict[str, object]]:
    """Yields every point of every curve, for curves.csv."""
    for variant in chosen:
        for seed, curve in variant.curves.items():
            for point in curve:
                names = {"model": study.plan.name, "method": variant.method.name, "replay": int(variant.replayed)}
                figures = {name: f"{value:.6g}" for name, value in point.figures.items() if math.isfinite(value)}
                shown = {
                    "step": f"{point.step:g}",
                    "seconds": f"{point.seconds:.3f}",
                    "wall": f"{point.wall:.3f}",
                    "lost": f"{point.value('lost'):.6g}",
                }
                yield {**names, "seed": seed, **shown, **figures}
