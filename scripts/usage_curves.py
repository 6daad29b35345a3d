"""Curves of slot usage over training, from run directories alone: a CSV, a table and a drawing.

Runs are named VARIANT-SEED; their metrics.csv must hold `train/usage/TABLE/...`. Writes `curves.csv` and `curves.svg`
and prints the table in Markdown.

    python scripts/usage_curves.py runs/* --out scripts/results/2026-11-21-usage
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

FIGURES = ("used_percent", "kl_count", "gini", "top50", "top90")
_COLOURS = ("#1f5fa8", "#c4502e", "#3c8f4e", "#8757a8", "#b8860b", "#555555")
_SIZE, _MARGIN = (720, 360), 48

#: Rows of one run: step, tokens and `FIGURES`.
Curve = list[dict[str, float]]


def read(run: Path, table: str) -> Curve:
    """Reads the rows of a run that have usage.

    Raises:
        SystemExit: no row has the usage of `table`.
    """
    with (run / "metrics.csv").open(newline="") as file:
        # Usage is logged less often than the loss: other rows have empty fields.
        rows = [row for row in csv.DictReader(file) if row.get(f"train/usage/{table}/used_percent")]
    if not rows:
        raise SystemExit(
            f"{run}/metrics.csv has no train/usage/{table}/...; choose a table that it has, as --table layer0.slot."
        )
    return [
        {"step": float(row["step"]), "tokens": float(row["tokens"])}
        | {name: float(row[f"train/usage/{table}/{name}"]) for name in FIGURES}
        for row in rows
    ]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Formats mean and range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(curves: dict[str, dict[str, Curve]], recall: dict[str, list[float]]) -> str:
    """Returns a Markdown table, one row per variant: usage early, at its lowest, half-way and at the end; recall."""
    lines = [
        "| variant | used %, first log | lowest | at tokens | half-way | end | KL, end | slots of 50%, end "
        "| recall, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, seeds in sorted(curves.items()):
        runs = list(seeds.values())
        lowest = [min(run, key=lambda point: point["used_percent"]) for run in runs]
        cells = [
            spread([run[0]["used_percent"] for run in runs]),
            spread([point["used_percent"] for point in lowest]),
            spread([point["tokens"] / 1e6 for point in lowest], 2) + " M",
            spread([run[len(run) // 2]["used_percent"] for run in runs]),
            spread([run[-1]["used_percent"] for run in runs]),
            spread([run[-1]["kl_count"] for run in runs], 2),
            spread([run[-1]["top50"] for run in runs], 0),
            spread([100 * value for value in recall[variant]]),
        ]
        lines.append(f"| {variant} ({len(runs)} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawing(curves: dict[str, dict[str, Curve]]) -> str:
    """Draws the share of used slots over tokens as an SVG, one line per run, one colour per variant."""
    width, height = _SIZE
    most = max(run[-1]["tokens"] for seeds in curves.values() for run in seeds.values())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">'
    ]
    lines.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    # Drawn by hand, so that the script needs nothing but the standard library.
    for percent in range(0, 101, 20):
        y = height - _MARGIN - percent / 100 * (height - 2 * _MARGIN)
        lines.append(
            f'<path d="M{_MARGIN} {y:.1f}H{width - 12}" stroke="#ddd"/><text x="10" y="{y + 4:.1f}">{percent}%</text>'
        )
    for million in range(int(most / 1e6) + 1):
        x = _MARGIN + million * 1e6 / most * (width - _MARGIN - 12)
        lines.append(f'<text x="{x:.1f}" y="{height - 28}" text-anchor="middle">{million} M</text>')
    lines.append(
        f'<text x="{width // 2}" y="{height - 8}" text-anchor="middle">'
        "tokens; share of the slots that were read in each window</text>"
    )
    for place, (variant, seeds) in enumerate(sorted(curves.items())):
        colour = _COLOURS[place % len(_COLOURS)]
        x = _MARGIN + 8 + place * (width - _MARGIN) // len(curves)
        lines.append(f'<text x="{x}" y="20" fill="{colour}">{variant}</text>')
        for run in seeds.values():
            points = " ".join(
                f"{_MARGIN + point['tokens'] / most * (width - _MARGIN - 12):.1f},"
                f"{height - _MARGIN - point['used_percent'] / 100 * (height - 2 * _MARGIN):.1f}"
                for point in run
            )
            lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Reads the runs, writes both files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--table", default="table0")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    curves: dict[str, dict[str, Curve]] = {}
    recall: dict[str, list[float]] = {}
    for run in arguments.runs:
        variant, _, seed = run.name.rpartition("-")
        curves.setdefault(variant, {})[seed] = read(run, arguments.table)
        record = json.loads((run / "run.json").read_text())
        recall.setdefault(variant, []).append(record["metrics"]["recall"]["paraphrase"]["recall"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "curves.csv").open("w", newline="") as file:
        # The column keeps the name that earlier results have.
        writer = csv.DictWriter(file, ["arm", "seed", "step", "tokens", *FIGURES])
        writer.writeheader()
        for variant, seeds in sorted(curves.items()):
            for seed, run in sorted(seeds.items()):
                for point in run:
                    writer.writerow({"arm": variant, "seed": seed, **{k: f"{v:g}" for k, v in point.items()}})
    (arguments.out / "curves.svg").write_text(drawing(curves), encoding="utf-8")
    print(table(curves, recall))


if __name__ == "__main__":
    main()
