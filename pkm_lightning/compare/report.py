"""Writes a study: report.html (one file, no network), report.md, runs.csv, plots, and TensorBoard's HParams.

Each file is written beside and renamed, so a report that is open while runs go on is always whole.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pkm_lightning.compare.board import write_board
from pkm_lightning.compare.comparison_file import NAME as COMPARISON_FILE
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.plots import INK, Plot, all_plots, known_names
from pkm_lightning.compare.runs_csv import runs_csv
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.tables import Table, all_tables, failures
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import write_beside

#: Values of one key that a report shows before it says how many more there are.
_SHOWN_VALUES = 6
_PAGES = ("report.md", "report.html")
#: The first line of a report.md.
_MARK = "<!-- a report of pkm_lightning -->"


def write_report(study: Study, out: Path) -> None:
    """Writes all files of the report into `out`, which is made if need be."""
    check_place(out)
    plots, tables = list(all_plots(study)), all_tables(study)
    pages = {name: _render(name, study, tables, plots, escape=name.endswith("html")) for name in _PAGES}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():  # first: report.md says whose directory this is
        write_beside(out / name, page)
    for plot in plots:
        write_beside(out / "plots" / f"{plot.name}.svg", plot.svg)
        write_beside(out / "plots" / f"{plot.name}.png", plot.png)
    for stale in known_names() - {plot.name for plot in plots}:
        for suffix in (".svg", ".png"):
            (out / "plots" / f"{stale}{suffix}").unlink(missing_ok=True)
    write_beside(out / "runs.csv", runs_csv(study))
    write_board(study, out / "hparams")


def check_place(out: Path) -> None:
    """Refuses to write a report where it would replace something else.

    Raises:
        RunDirectoryError: `out` is a run's directory, or holds files and no earlier report or comparison.
    """
    if (out / "run.json").exists():
        raise RunDirectoryError(f"out={out} is the directory of a run; choose another for the report.")
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"out={out} is a file; choose another place for the report.")
    if out.is_dir() and any(out.iterdir()) and not ((out / COMPARISON_FILE).exists() or _is_report(out / "report.md")):
        raise RunDirectoryError(f"out={out} holds files, but no report; choose an empty or new directory.")


def _is_report(file: Path) -> bool:
    """A report that this has written, and may replace."""
    try:
        return file.read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _render(name: str, study: Study, tables: Sequence[Table], plots: Sequence[Plot], *, escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pkm_lightning.compare", "."),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(inline=_inline, cell=_cell)
    return environment.get_template(f"{name}.jinja").render(
        mark=_MARK,
        study=study,
        tables=tables,
        plots=plots,
        failures=failures(study),
        commands=[shlex.join(said) for comparison in study.comparisons for said in _commands(comparison)],
        unfair=[_as_row(difference.key, difference.values, difference.said_by) for difference in study.unfair],
        fair=[
            (*_as_row(difference.key, difference.values, ()), difference.kind)
            for difference in study.differences
            if difference.kind != "other"
        ],
        circumstances=_circumstances(study),
    )


def _commands(comparison: Comparison) -> list[list[str]]:
    return [*comparison.earlier, comparison.command]


def _as_row(key: str, values: dict[str, tuple[str, ...]], said_by: Sequence[str]) -> tuple[str, str, str]:
    """Key, values by arm, and which variants' own overrides say so."""
    by_value: dict[tuple[str, ...], list[str]] = {}
    for arm, of_arm in values.items():
        by_value.setdefault(of_arm, []).append(arm)
    shown = [f"{' | '.join(of_arm)} ({', '.join(arms)})" for of_arm, arms in list(by_value.items())[:_SHOWN_VALUES]]
    more = f"; and {len(by_value) - _SHOWN_VALUES} further values" if len(by_value) > _SHOWN_VALUES else ""
    return key, "; ".join(shown) + more, ", ".join(said_by)


def _circumstances(study: Study) -> list[tuple[str, str]]:
    """Where the runs were made, each value that occurs."""
    keys: dict[str, Any] = {
        "device": lambda r: r.get("device"),
        "processes": lambda r: r.get("world_size"),
        "threads a process": lambda r: r.get("threads"),
        "precision": lambda r: r.get("precision"),
        "versions": lambda r: ", ".join(f"{k} {v}" for k, v in sorted((r.get("versions") or {}).items())),
        "commit": lambda r: r.get("commit"),
        "data": lambda r: str(r.get("data") or "")[:16],
        "started": lambda r: str(r.get("started") or "")[:10],
    }
    rows = []
    for label, get in keys.items():
        values = dict.fromkeys(str(get(run.record)) for run in study.runs if run.record)
        rows.append((label, "; ".join(value for value in values if value not in ("None", ""))))
    return [(label, text) for label, text in rows if text]


def _inline(svg: str) -> Markup:
    """The drawing without its XML head, in the page's own colour, as wide as its place."""
    drawing = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head, rest = drawing.split(">", 1)
    return Markup(re.sub(r'\s(?:width|height)="[^"]*"', "", head) + ">" + rest)


def _cell(text: str) -> str:
    """`text` in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
