"""The plots of a report, as SVG and PNG; a plot without a message about these runs is left out.

| left out | where |
|---|---|
| quality or loss over the trunk's FLOPs | all variants have equal FLOPs per token: it is the plot over tokens |
| quality by parameters or bytes | all variants have equally many |
| recall by exposure | all facts are shown equally often |
| curves over a run | no run has two validations |
| bars | there is one variant |
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_lightning.compare.breakdowns import has_uniform_exposures
from pkm_lightning.compare.panels import (
    AXES,
    draw_bars,
    draw_bits,
    draw_by_compute,
    draw_by_cost,
    draw_curves,
    draw_deciles,
    draw_usage,
)
from pkm_lightning.compare.plot_style import STYLE, VariantStyles
from pkm_lightning.compare.study import Study


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
    curves = {f"{name}_by_{axis}" for name in ("quality", "loss") for axis in AXES}
    costs = {f"quality_by_{axis}" for axis in ("compute", "params_total", "bytes_decode")}
    others = {"recall_by_decile", "bits_per_parameter", "usage_used_percent", "usage_kl_count"}
    return curves | costs | others | {"tokens_per_second", "peak_memory_bytes"}


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    draw: Callable[[Axes], bool]


def all_plots(study: Study) -> Iterator[Plot]:
    """Draws every panel that the runs have results for, and whose axis distinguishes them."""
    if study.resampled is None:
        return
    styles = VariantStyles(study)
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


def _panels(study: Study, styles: VariantStyles) -> Iterator[_Panel]:
    """Yields every panel whose axis distinguishes the runs, whether or not the runs have results for it."""
    quality = study.quality

    def panel(name: str, title: str, draw: Callable[..., bool], *arguments: object) -> _Panel:
        return _Panel(name, title, lambda axes: draw(axes, study, styles, *arguments))

    if study.ladder:
        yield panel("quality_by_compute", f"{quality.label} by compute", draw_by_compute)
    curves = [("quality", quality.curve, quality.label, quality.short_label)]
    curves += [("loss", "val/loss", "validation loss", "loss")] if quality.curve != "val/loss" else []
    axes_of_curves = [axis for axis in AXES if axis != "active_flops" or study.varies("trunk_flops_forward")]
    for (name, column, label, beside), axis in itertools.product(curves, axes_of_curves):
        title = f"{label} by {AXES[axis].removeprefix('training ')}"
        yield panel(f"{name}_by_{axis}", title, draw_curves, column, axis, beside)
    for axis, label in (("params_total", "parameters, total"), ("bytes_decode", "bytes per token, decoding")):
        yield panel(f"quality_by_{axis}", f"{quality.label} by {label}", draw_by_cost, axis, label)
    if not has_uniform_exposures(study):
        yield panel("recall_by_decile", "recall of paraphrases by exposure", draw_deciles)
    yield panel("bits_per_parameter", "bits stored per parameter", draw_bits)
    yield panel("usage_used_percent", "slots in use", draw_usage, "used_percent")
    yield panel("usage_kl_count", "KL of reads from uniform, nats", draw_usage, "kl_count")
    speed, memory = "tokens per second", "peak memory, MB"
    yield panel("tokens_per_second", f"{speed}, training", draw_bars, "tokens_per_second", speed, 1.0)
    yield panel("peak_memory_bytes", memory, draw_bars, "peak_memory_bytes", memory, 1e-6)
