"""Bits stored by runs on data whose entropy is known (`pkm_lightning.callbacks.StoredBits`), as cells of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pkm_lightning.compare.bootstrap import finite_mean
from pkm_lightning.compare.records import Run
from pkm_lightning.compare.study import Study

#: Ends of the metrics of rounded weights, and what was rounded.
_ROUNDED = {
    f"_{width}{suffix}": f"{what} {width}"
    for suffix, what in (("", "tables"), ("_all", "all"))
    for width in ("int8", "int4", "int2")
}
_COLUMNS = (
    ("bits per person", "bits_person", "{:.1f}"),
    ("clipped", "bits_person_clipped", "{:.1f}"),
    ("kbit stored", "stored_kbit", "{:,.1f}"),
    ("of all there are", "stored_share", "{:.1%}"),
    ("bits per parameter", "bits_per_parameter", "{:.3f}"),
    ("per active parameter", "bits_per_active_parameter", "{:.3f}"),
    ("per byte", "bits_per_byte", "{:.3f}"),
    *((f"per byte, {what}", f"bits_per_byte{end}", "{:.3f}") for end, what in _ROUNDED.items()),
)


def known_entropy(study: Study) -> tuple[str, list[str], list[list[str]]]:
    """Returns a note, columns and rows; no rows where no run has the metrics, and no column without a figure."""
    means = {variant: _means(runs) for variant, runs in study.variants.items()}
    means = {variant: figures for variant, figures in means.items() if math.isfinite(figures["bits_person"])}
    columns = [column for column in _COLUMNS if any(math.isfinite(figures[column[1]]) for figures in means.values())]
    rows = [
        [variant, *(form.format(figures[key]) if math.isfinite(figures[key]) else "-" for _, key, form in columns)]
        for variant, figures in means.items()
    ]
    return _NOTE, ["variant", *(label for label, *_ in columns)], rows


def _means(runs: Sequence[Run]) -> dict[str, float]:
    names = [name for _, name, _ in _COLUMNS]
    figures = {name: finite_mean([_figure(run, name) for run in runs]) for name in names}
    return {**figures, "stored_kbit": finite_mean([_figure(run, "stored_bits") for run in runs]) / 1e3}


def _figure(run: Run, name: str) -> float:
    value = (run.record.get("metrics") or {}).get(f"test/{name}")
    return math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


_NOTE = (
    "Bits of names and values whose entropy is known, less the model's -log2 probability of them, by the formula of "
    "arXiv 2404.05405; means over seeds. 'Clipped': no name or value counts below 0. 'Of all there are': near 100% the "
    "data, and not the model, limit what is stored. 'Per byte': of all weights as trained; 'tables int8': tested once "
    "more with the value tables rounded to codes and scales, 'all int8' with every matrix rounded so."
)
