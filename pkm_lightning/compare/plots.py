"""The plots of a report: panels that are legible on a phone, and on light and dark backgrounds.

Text, axes and grid are drawn in `INK`, which the HTML report replaces by the page's text colour.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from pkm_lightning.compare.curves import mean_curve
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.tables import recall_by_decile

INK = "#1b1f24"
# Okabe and Ito's colours for colour-blind readers, without black and yellow: distinguishable on white and on dark grey.
COLOURS = ("#d55e00", "#0084c8", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7fd6", "#b3a100")
_DENSE = "#8c959f"
MARKERS = "osD^vPX*"
# Solid, dashed, dash-dotted, dotted; then as (offset, (on, off, ...)) in points.
_DASHES: Any = ("-", "--", "-.", ":", (0, (9, 3)), (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)), (0, (3, 5)))
_AXES = {"tokens": "tokens", "seconds": "training seconds", "active_flops": "training FLOPs, trunk"}
STYLE: Any = {
    "figure.figsize": (5.0, 3.9),
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlesize": 11,
    "svg.hashsalt": "pkm_lightning",  # the ids in an SVG would be random, and equal runs give different files
    "text.parse_math": False,  # a variant's name may contain a dollar sign
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


#: Characters in one row of a legend below a figure of the usual width, and in a line of a label beside the axes.
_LEGEND_WIDTH, _LABEL_WIDTH = 80, 36


@dataclass(frozen=True)
class Plot:
    """A drawn panel.

    Args:
        name: names its files.
        title: in words; also the alternative text.
        svg: on a transparent background.
        png: on white.
    """

    name: str
    title: str
    svg: str
    png: bytes


def known_names() -> set[str]:
    """Returns all names of panels: files that a report may replace or remove."""
    curves = {f"{name}_by_{axis}" for name in ("quality", "loss") for axis in _AXES}
    costs = {f"quality_by_{axis}" for axis in ("compute", "params_total", "bytes_decode")}
    others = {"recall_by_decile", "bits_per_parameter", "usage_used_percent", "usage_kl_count"}
    return curves | costs | others | {"tokens_per_second", "peak_memory_bytes"}


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    draw: Callable[[Axes], bool]


def all_plots(study: Study) -> Iterator[Plot]:
    """Draws every panel that the runs have results for."""
    if study.resampled is None:
        return
    styles = _Styles(study)
    with mpl.rc_context(STYLE):
        for panel in _panels(study, styles):
            figure = Figure()
            axes = figure.subplots()
            if panel.draw(axes):
                axes.set_title(panel.title, loc="left")
                yield _saved(figure, panel)


def _saved(figure: Figure, panel: _Panel) -> Plot:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=150, facecolor="white")
    return Plot(panel.name, panel.title, svg.getvalue(), png.getvalue())


class _Styles:
    """Colour, dash and marker of each variant; dense variants are grey."""

    def __init__(self, study: Study) -> None:
        self._by_variant: dict[str, tuple[str, Any, str]] = {}
        dense, others = itertools.count(), itertools.count()
        for variant, runs in study.variants.items():
            is_dense = runs[0].is_dense
            i = next(dense if is_dense else others)
            colour = _DENSE if is_dense else COLOURS[i % len(COLOURS)]
            # Dashes distinguish the grey lines, and variants whose colour repeats.
            dash = _DASHES[(i if is_dense else i // len(COLOURS)) % len(_DASHES)]
            self._by_variant[variant] = (colour, dash, MARKERS[i % len(MARKERS)])

    def line(self, variant: str) -> dict[str, Any]:
        colour, dash, _ = self._by_variant[variant]
        return {"color": colour, "linestyle": dash, "label": variant}

    def point(self, variant: str) -> dict[str, Any]:
        colour, _, marker = self._by_variant[variant]
        return {"color": colour, "marker": marker, "label": variant}

    def colour(self, variant: str) -> str:
        return self._by_variant[variant][0]


def _panels(study: Study, styles: _Styles) -> Iterator[_Panel]:
    """Yields every panel, whether or not the runs have results for it."""
    quality = study.quality

    def panel(name: str, title: str, draw: Callable[..., bool], *arguments: object) -> _Panel:
        return _Panel(name, title, lambda axes: draw(axes, study, styles, *arguments))

    if study.ladder:
        yield panel("quality_by_compute", f"{quality.label} by compute", _by_compute)
    curves = [("quality", quality.curve, quality.label)]
    curves += [("loss", "val/loss", "validation loss")] if quality.curve != "val/loss" else []
    for (name, column, label), axis in itertools.product(curves, _AXES):
        title = f"{label} by {_AXES[axis].removeprefix('training ')}"
        yield panel(f"{name}_by_{axis}", title, _curves, column, axis, label)
    for axis, label in (("params_total", "parameters, total"), ("bytes_decode", "bytes per token, decoding")):
        yield panel(f"quality_by_{axis}", f"{quality.label} by {label}", _by_cost, axis, label)
    yield panel("recall_by_decile", "recall of paraphrases by exposure", _deciles)
    yield panel("bits_per_parameter", "bits stored, per parameter", _bits)
    yield panel("usage_used_percent", "slots in use, %", _usage, "used_percent")
    yield panel("usage_kl_count", "KL of reads from uniform, nats", _usage, "kl_count")
    yield panel("tokens_per_second", "tokens per second, training", _bars, "tokens_per_second", 1.0)
    yield panel("peak_memory_bytes", "peak memory, MB", _bars, "peak_memory_bytes", 1e-6)


def _curves(axes: Axes, study: Study, styles: _Styles, column: str, axis: str, label: str) -> bool:
    is_drawn = False
    for variant, runs in study.variants.items():
        x, mean, low, high = mean_curve(runs, column, axis)
        if not np.isfinite(x).any():
            continue
        is_drawn = True
        axes.plot(x, mean, **styles.line(variant))
        axes.fill_between(x, low, high, color=styles.colour(variant), alpha=0.15, linewidth=0)
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(EngFormatter())
    if column == "val/loss":
        # A loss falls fast, then slowly: only a logarithmic axis shows the end of the run.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return is_drawn


def _by_compute(axes: Axes, study: Study, styles: _Styles) -> bool:
    """Draws quality against the trunk's forward FLOPs per token; the ladder is a line, bars are intervals."""
    assert study.resampled is not None
    flops = {variant: study.mean_cost(variant, "trunk_flops_forward") for variant in study.variants}
    mean = study.resampled.mean
    axes.plot([flops[rung] for rung in study.ladder], [mean[rung] for rung in study.ladder], color=_DENSE, zorder=1)
    for variant in study.variants:
        _point(axes, study, styles, variant, flops[variant])
    axes.set_xscale("log")
    _few_ticks(axes.xaxis)
    axes.set_xlabel("forward FLOPs per token, trunk")
    axes.set_ylabel(study.quality.label)
    _legend(axes)
    return True


def _by_cost(axes: Axes, study: Study, styles: _Styles, name: str, label: str) -> bool:
    is_drawn = False
    for variant in study.variants:
        value = study.mean_cost(variant, name)
        if math.isfinite(value):
            _point(axes, study, styles, variant, value)
            is_drawn = True
    axes.set_xscale("log")
    _few_ticks(axes.xaxis)
    axes.set_xlabel(label)
    axes.set_ylabel(study.quality.label)
    _legend(axes)
    return is_drawn


def _point(axes: Axes, study: Study, styles: _Styles, variant: str, x: float) -> None:
    assert study.resampled is not None
    mean, (low, high) = study.resampled.mean[variant], study.resampled.interval(variant)
    axes.plot([x, x], [low, high], color=styles.colour(variant), linewidth=1.2)
    axes.plot([x], [mean], linestyle="none", markersize=6, **styles.point(variant))


def _deciles(axes: Axes, study: Study, styles: _Styles) -> bool:
    is_drawn = False
    for variant in study.variants:
        recall = recall_by_decile(study, variant)
        if len(recall) > 1:
            axes.plot(list(recall), list(recall.values()), **styles.line(variant))
            is_drawn = True
    axes.set_xlabel("decile of subjects, 0 the most shown")
    axes.set_ylabel("recall, paraphrase")
    axes.set_ylim(0, 1.02)
    _legend(axes)
    return is_drawn


def _bits(axes: Axes, study: Study, styles: _Styles) -> bool:
    ratios = {}
    for variant in study.variants:
        _, stored = study.bits_stored(variant)
        ratios[variant] = [stored / study.mean_cost(variant, name) for name in ("params_total", "params_active")]
    known = {variant: values for variant, values in ratios.items() if np.isfinite(values).all()}
    if not known:
        return False
    places = np.arange(len(known))
    colours = [styles.colour(variant) for variant in known]
    axes.barh(places - 0.2, [total for total, _ in known.values()], 0.36, color=colours)
    axes.barh(places + 0.2, [active for _, active in known.values()], 0.36, color=colours, alpha=0.45)
    axes.set_yticks(places, _in_lines(known))
    axes.invert_yaxis()
    axes.set_xlabel("full: per parameter, pale: per active parameter")
    return True


def _usage(axes: Axes, study: Study, styles: _Styles, figure: str) -> bool:
    """Draws the mean over layers, for runs with the callback `slot_usage`."""
    is_drawn = False
    for variant, runs in study.variants.items():
        for run in runs[:1]:
            points = [
                (row["tokens"], np.mean(values))
                for row in run.rows
                if (values := [v for k, v in row.items() if k.startswith("train/usage/layer") and k.endswith(figure)])
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **styles.line(variant))
                is_drawn = True
    axes.set_xlabel("tokens (first seed, mean over layers)")
    _legend(axes)
    return is_drawn


def _bars(axes: Axes, study: Study, styles: _Styles, name: str, scale: float) -> bool:
    means = {variant: study.mean_cost(variant, name) for variant in study.variants}
    known = {variant: value for variant, value in means.items() if math.isfinite(value)}
    if not known:
        return False
    places = np.arange(len(known))
    axes.barh(places, [value * scale for value in known.values()], color=[styles.colour(name) for name in known])
    axes.set_yticks(places, _in_lines(known))
    axes.invert_yaxis()
    return True


def _few_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis at 1, 2 and 5 times the powers of ten, for example 200 k."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(EngFormatter())
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        # Below the axes: inside it would cover curves, and many variants need several rows.
        columns = _LEGEND_WIDTH // (max(map(len, labels)) + 6)
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(max(columns, 1), 3))


def _in_lines(names: Iterable[str]) -> list[str]:
    # Beside a name in one line nothing may be left for the axes.
    return ["\n".join(wrap(name, _LABEL_WIDTH)) for name in names]
