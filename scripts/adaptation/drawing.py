"""Plots of a comparison: learning against forgetting, one line per method, the mean over seeds at each evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from curves import LEARNED
from matplotlib.figure import Figure
from tables import Variant, figure

from pkm_lightning.compare.plot_style import COLOURS, MARKERS, STYLE

#: Panels by name: figure across and up, factors, and their labels.
PANELS = {
    "lost": ("lost", 100, "A lost, %", LEARNED, 100, "B, paraphrased, %"),
    "kl": ("known_kl", 1, "KL from the start on other text, nats", LEARNED, 100, "B, paraphrased, %"),
    "seconds": ("seconds", 1, "processor seconds of training", LEARNED, 100, "B, paraphrased, %"),
}


def draw(name: str, model: str, chosen: Sequence[Variant], folder: Path) -> str | None:
    """Writes a panel as `MODEL-NAME.png` into `folder` and returns its file name; None where there is nothing in it."""
    across, x_factor, x_label, up, y_factor, y_label = PANELS[name]
    file = f"{model}-{name}.png"
    with mpl.rc_context({**STYLE, "figure.figsize": (7.0, 5.0)}):
        canvas = Figure()
        axes = canvas.subplots()
        is_drawn = False
        # A method has one colour; with old data its line is dashed.
        for number, (_, pair) in enumerate(itertools.groupby(chosen, key=lambda variant: variant.method.name)):
            for variant in pair:
                x, y = _mean(variant, across) * x_factor, _mean(variant, up) * y_factor
                if not (np.isfinite(x) & np.isfinite(y)).any():
                    continue
                is_drawn = True
                style = {"linestyle": "--" if variant.replayed else "-", "marker": MARKERS[number % len(MARKERS)]}
                axes.plot(x, y, color=COLOURS[number % len(COLOURS)], markersize=3, label=variant.label, **style)
        if not is_drawn:
            return None
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(-2, 102)
        canvas.legend(loc="outside lower center", ncols=3)
        canvas.savefig(folder / file, dpi=130, facecolor="white")
    return file


def _mean(variant: Variant, name: str) -> np.ndarray:
    """Returns the mean over seeds at each evaluation that all runs have."""
    curves = variant.present
    length = min((len(curve) for curve in curves), default=0)
    values = [[figure(point, name) for point in curve[:length]] for curve in curves]
    return np.mean(values, axis=0) if length else np.array([math.nan])
