"""The tables of a report as rows of a CSV, so that figures of pages can name one.

`python tests/report_tables.py FOLDER ...` writes summary.csv beside the report.md of each folder: one row per cell that
holds numbers, under the heading of its table (after that of its section, where another one has such a table), the first
cell of its row and the head of its column. `+17.6 pp (+15.5 pp
to +19.6 pp)` is a value with its interval from `low` to `high`; an interval in its own column goes to the one before.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

_NUMBER = r"((?:[<>]= ?)?[-+]?\d[\d,]*(?:\.\d+)?)(?:%| pp|x)?"
_CELL = re.compile(rf"(?:{_NUMBER})?(?:(?:^| )\(?{_NUMBER} to {_NUMBER}\)?)?")
HEADER = ("table", "row", "column", "value", "low", "high")


def cells(report: str) -> list[list[str]]:
    """Returns the rows of the CSV, for the tables of `report` whose rows are variants, methods or figures."""
    rows: list[list[str]] = []
    section, heading, heads = "", "", [""]
    seen = set()
    for line in report.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            section = heading if line.startswith("## ") else section
            heading = f"{section}: {heading}" if heading in seen else heading
            seen.add(heading)
        if not line.startswith("|"):
            heads = []
            continue
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        heads = heads or [first, *others]
        for head, cell in zip(heads[1:], others, strict=False):
            match = _CELL.fullmatch(cell)
            if heads[0] not in ("variant", "method", "figure", "form") or not match or not cell:
                continue
            value, *interval = (re.sub(r"[ ,+]", "", number or "") for number in match.groups())
            if head.endswith("interval") and not value:
                rows[-1][4:] = interval
            else:
                rows.append([heading, first, head, value, *interval])
    return rows


def summary(report: str) -> str:
    """Returns the CSV of the tables of `report`, the text of a report.md."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(cells(report))
    return text.getvalue()


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        report = (folder / "report.md").read_text(encoding="utf-8")
        (folder / "summary.csv").write_text(summary(report), encoding="utf-8")
