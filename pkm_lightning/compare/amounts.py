"""Numbers as a report writes them: large ones with three digits and a letter, none with an exponent."""

from __future__ import annotations

import math

#: Of thousands, millions and so on.
LETTERS = ("", "k", "M", "G", "T", "P", "E")
#: A smaller number is written out.
_WRITTEN_OUT = 10_000


def compact(value: float) -> str:
    """Returns `9,999`, `12.8 k`, `2.77 M`: parameters, FLOPs, bytes and tokens; `-` where the number is not known."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < _WRITTEN_OUT:
        return f"{value:,.0f}"
    # Rounding comes first: 999,999 is 1.00 M.
    rounded = float(f"{value:.3g}")
    power = min(int(math.log10(abs(rounded)) // 3), len(LETTERS) - 1)
    scaled = rounded / 1000**power
    return f"{scaled:.{max(2 - int(math.log10(abs(scaled))), 0)}f} {LETTERS[power]}"


def seconds(value: float) -> str:
    """Returns a number of seconds without its unit: whole ones, below 10 with a decimal."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def plain(value: float) -> str:
    """Returns a number without an exponent, for the ticks of an axis: `0.25`, `1,500`."""
    # Adding 0 makes a negative zero positive.
    return f"{round(value, 10) + 0.0:,.10f}".rstrip("0").rstrip(".")
