"""How plots look: legible on a phone, on light and dark backgrounds, and for colour-blind readers.

Text, axes and grid are drawn in `INK`, which the HTML report replaces by the page's text colour.
"""

from __future__ import annotations

import itertools
from typing import Any

from pkm_lightning.compare.study import Study

INK = "#1b1f24"
# Okabe and Ito's colours for colour-blind readers, without black and yellow: distinguishable on white and on dark grey.
COLOURS = ("#d55e00", "#0084c8", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7fd6", "#b3a100")
#: Dense variants are grey.
DENSE = "#8c959f"
MARKERS = "osD^vPX*"
# Solid, dashed, dash-dotted, dotted; then as (offset, (on, off, ...)) in points.
DASHES: Any = ("-", "--", "-.", ":", (0, (9, 3)), (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)), (0, (3, 5)))
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


class VariantStyles:
    """Colour, dash and marker of each variant; dense variants are grey."""

    def __init__(self, study: Study) -> None:
        self._by_variant: dict[str, tuple[str, Any, str]] = {}
        dense, others = itertools.count(), itertools.count()
        for variant, runs in study.variants.items():
            is_dense = runs[0].is_dense
            i = next(dense if is_dense else others)
            colour = DENSE if is_dense else COLOURS[i % len(COLOURS)]
            # Dashes distinguish the grey lines, and variants whose colour repeats.
            dash = DASHES[(i if is_dense else i // len(COLOURS)) % len(DASHES)]
            # A colour that repeats comes with another marker.
            marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
            self._by_variant[variant] = (colour, dash, marker)

    def line(self, variant: str) -> dict[str, Any]:
        """Returns the keywords of a line."""
        colour, dash, _ = self._by_variant[variant]
        return {"color": colour, "linestyle": dash, "label": variant}

    def point(self, variant: str) -> dict[str, Any]:
        """Returns the keywords of a point."""
        colour, _, marker = self._by_variant[variant]
        return {"color": colour, "marker": marker, "label": variant}

    def colour(self, variant: str) -> str:
        """Returns its colour."""
        return self._by_variant[variant][0]
