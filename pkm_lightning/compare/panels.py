"""The panels of a report's plots: each draws one question on empty axes, and returns whether the runs answer it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes

from pkm_lightning.compare.axes import (
    add_legend,
    count_axis,
    in_lines,
    log_axis,
    percent_axis,
    plain_axis,
    quality_axis,
)
from pkm_lightning.compare.breakdowns import recall_by_decile
from pkm_lightning.compare.curves import mean_curve
from pkm_lightning.compare.plot_style import DENSE, VariantStyles
from pkm_lightning.compare.study import Study

#: Abscissas of curves over a run, in words.
AXES = {"tokens": "tokens", "seconds": "training seconds", "active_flops": "training FLOPs, trunk"}


def draw_curves(axes: Axes, study: Study, styles: VariantStyles, column: str, axis: str, label: str) -> bool:
    """Draws a column of metrics.csv over the runs: the mean over seeds, and a band from the least to the greatest."""
    has_line = False
    for variant, runs in study.variants.items():
        x, mean, low, high = mean_curve(runs, column, axis)
        if not np.isfinite(x).any():
            continue
        has_line = has_line or len(x) > 1
        axes.plot(x, mean, **styles.line(variant))
        axes.fill_between(x, low, high, color=styles.colour(variant), alpha=0.15, linewidth=0)
    if not has_line:
        return False
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(label)
    plain_axis(axes.xaxis) if axis == "seconds" else count_axis(axes.xaxis)
    if column == "val/loss":
        # A loss falls fast, then slowly: only a logarithmic axis shows the end of the run.
        log_axis(axes.yaxis, is_count=False)
    else:
        quality_axis(axes.yaxis, study.quality)
    add_legend(axes)
    return True


def draw_by_compute(axes: Axes, study: Study, styles: VariantStyles) -> bool:
    """Draws quality against the trunk's forward FLOPs per token; the ladder is a line, bars are intervals."""
    assert study.resampled is not None
    mean = study.resampled.mean
    flops = [study.mean_cost(rung, "trunk_flops_forward") for rung in study.ladder]
    axes.plot(flops, [mean[rung] for rung in study.ladder], color=DENSE, zorder=1)
    return draw_by_cost(axes, study, styles, "trunk_flops_forward", "forward FLOPs per token, trunk")


def draw_by_cost(axes: Axes, study: Study, styles: VariantStyles, name: str, label: str) -> bool:
    """Draws quality against one of `costs.FIGURES`, which must differ between variants."""
    assert study.resampled is not None
    if not study.varies(name):
        return False
    for variant in study.variants:
        x = study.mean_cost(variant, name)
        if math.isfinite(x) and x > 0:
            axes.plot([x, x], study.resampled.interval(variant), color=styles.colour(variant), linewidth=1.2)
            mean = study.resampled.mean[variant]
            axes.plot([x], [mean], linestyle="none", markersize=6, **styles.point(variant))
    log_axis(axes.xaxis, is_count=True)
    quality_axis(axes.yaxis, study.quality)
    axes.set_xlabel(label)
    axes.set_ylabel(study.quality.short_label)
    add_legend(axes)
    return True


def draw_deciles(axes: Axes, study: Study, styles: VariantStyles) -> bool:
    """Draws recall of paraphrases by decile of exposure."""
    is_drawn = False
    for variant in study.variants:
        recall = recall_by_decile(study, variant)
        if len(recall) > 1:
            axes.plot(list(recall), list(recall.values()), **styles.line(variant))
            is_drawn = True
    axes.set_xlabel("decile of subjects, 0 the most shown")
    axes.set_ylabel("recall")
    axes.set_ylim(0, 1.02)
    percent_axis(axes.yaxis)
    add_legend(axes)
    return is_drawn


def draw_bits(axes: Axes, study: Study, styles: VariantStyles) -> bool:
    """Draws bits stored per parameter, of all and of the active ones."""
    ratios = {}
    for variant in study.variants:
        _, stored = study.bits_stored(variant)
        ratios[variant] = [stored / study.mean_cost(variant, name) for name in ("params_total", "params_active")]
    known = {variant: values for variant, values in ratios.items() if np.isfinite(values).all()}
    if len(known) < 2:
        return False
    places = np.arange(len(known))
    colours = [styles.colour(variant) for variant in known]
    axes.barh(places - 0.2, [total for total, _ in known.values()], 0.36, color=colours)
    axes.barh(places + 0.2, [active for _, active in known.values()], 0.36, color=colours, alpha=0.45)
    axes.set_yticks(places, in_lines(known))
    axes.invert_yaxis()
    plain_axis(axes.xaxis)
    axes.set_xlabel("bits per parameter; pale: per active one")
    return True


def draw_usage(axes: Axes, study: Study, styles: VariantStyles, figure: str) -> bool:
    """Draws a figure of slot usage, mean over layers, for runs with the callback `slot_usage`."""
    has_line = False
    for variant, runs in study.variants.items():
        points = [
            (row["tokens"], np.mean(values))
            for row in runs[0].rows
            if (values := [v for k, v in row.items() if k.startswith("train/usage/layer") and k.endswith(figure)])
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **styles.line(variant))
            has_line = has_line or len(points) > 1
    axes.set_xlabel("tokens (first seed, mean over layers)")
    count_axis(axes.xaxis)
    percent_axis(axes.yaxis, 100) if figure.endswith("percent") else plain_axis(axes.yaxis)
    add_legend(axes)
    return has_line


def draw_bars(axes: Axes, study: Study, styles: VariantStyles, name: str, label: str, scale: float) -> bool:
    """Draws one of `costs.FIGURES` times `scale` as bars."""
    means = {variant: study.mean_cost(variant, name) for variant in study.variants}
    known = {variant: value for variant, value in means.items() if math.isfinite(value)}
    if len(known) < 2:
        return False
    places = np.arange(len(known))
    axes.barh(places, [value * scale for value in known.values()], color=[styles.colour(name) for name in known])
    axes.set_yticks(places, in_lines(known))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    count_axis(axes.xaxis)
    return True
