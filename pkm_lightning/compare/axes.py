"""Ticks of a plot's axes: percent, one letter for all thousands of an axis, plain numbers, never a power of ten."""

from __future__ import annotations

import math
from collections.abc import Iterable
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pkm_lightning.compare.amounts import LETTERS, plain
from pkm_lightning.compare.quality import Quality

#: Characters in one row of a legend below a figure of the usual width, and in a line of a label beside the axes.
_LEGEND_WIDTH, _LABEL_WIDTH = 80, 36
# Inches: of a figure without its legend, and of a row of that.
_HEIGHT, _ROW = 3.6, 0.19
# Ticks of a logarithmic axis within each power of ten; the first that gives enough of them.
_STEPS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
_FEWEST, _MOST = 3, 7


def percent_axis(axis: Axis, whole: float = 1.0) -> None:
    """Labels an axis of shares, of which `whole` is all, in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{plain(100 * value / whole)}%"))


def plain_axis(axis: Axis) -> None:
    """Labels an axis with numbers that are written out: `0.25`, `1,500`."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def count_axis(axis: Axis) -> None:
    """Labels an axis of counts with one letter for all its thousands: `0`, `0.5 M`, `1 M`."""
    power = _power(max(map(abs, axis.get_view_interval())))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _in_thousands(value, power)))


def quality_axis(axis: Axis, quality: Quality) -> None:
    """Labels an axis of a metric: shares in percent, bits, losses and perplexities plainly."""
    percent_axis(axis) if quality.is_share else plain_axis(axis)


def log_axis(axis: Axis, *, is_count: bool) -> None:
    """Makes an axis logarithmic, after everything on it is drawn, and labels it with a few round numbers.

    Args:
        axis: of a plot whose values on it are positive.
        is_count: whether thousands get a letter.
    """
    axes = axis.axes
    set_scale = axes.set_xscale if axis is axes.xaxis else axes.set_yscale
    set_scale("log")
    axes.autoscale_view()
    low, high = axis.get_view_interval()
    ticks = _log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    if not is_count:
        plain_axis(axis)
    elif ticks[-1] < 1000 * ticks[0]:
        count_axis(axis)
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: _in_thousands(value, _power(value))))


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers from `low` to `high`, about as many as an axis has room for."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= _FEWEST:
            return ticks[:: math.ceil(len(ticks) / _MOST)]
    # Within a factor of two a linear axis has the rounder numbers.
    return [
        float(tick) for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high
    ] or [low]


def _power(value: float) -> int:
    """Returns the power of a thousand that a number is written in."""
    return min(max(int(math.log10(value) // 3), 0), len(LETTERS) - 1) if value > 0 else 0


def _in_thousands(value: float, power: int) -> str:
    letter = f" {LETTERS[power]}" if power and value else ""
    return plain(value / 1000**power) + letter


def add_legend(axes: Axes) -> None:
    """Puts the legend below the axes: inside it would cover curves, and many variants need several rows."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = min(max(_LEGEND_WIDTH // (max(map(len, labels)) + 6), 1), 3)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        # The legend must not take its rows from the axes.
        figure.set_figheight(_HEIGHT + _ROW * math.ceil(len(labels) / columns))


def in_lines(names: Iterable[str]) -> list[str]:
    """Breaks names beside the axes, where a name in one line may leave nothing for the axes."""
    return ["\n".join(wrap(name, _LABEL_WIDTH)) for name in names]
