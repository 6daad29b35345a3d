"""Writes a study into a directory: report.html, report.md, runs.csv, differences.csv and plots.

Each file is written next to its old version and renamed, so a report that is open while runs go on is always whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pkm_lightning.compare.comparison_file import NAME as COMPARISON_FILE
from pkm_lightning.compare.pairs import pairs_csv
from pkm_lightning.compare.runs_csv import runs_csv
from pkm_lightning.compare.study import Study
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import open_regular, write_beside

#: First line of a report.md, which marks the directory as that of a report.
MARK = "<!-- a report of pkm_lightning -->"


def write_report(study: Study, out: Path) -> None:
    """Writes all files of the report into `out`, which is created if necessary.

    Raises:
        RunDirectoryError: `out` holds something else; see `check_place`.
    """
    # matplotlib and jinja2 take a second to import; commands that end without a report do not pay for them.
    from pkm_lightning.compare.pages import render_pages
    from pkm_lightning.compare.plots import all_plots, known_names

    check_place(out)
    plots = list(all_plots(study))
    pages = render_pages(study, plots, MARK)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    # The pages come first: a command that is killed half-way leaves a directory that report.md marks as ours.
    for name, page in pages.items():
        write_beside(out / name, page)
    for plot in plots:
        write_beside(out / "plots" / f"{plot.name}.svg", plot.svg)
        write_beside(out / "plots" / f"{plot.name}.png", plot.png)
    for stale in known_names() - {plot.name for plot in plots}:
        for suffix in (".svg", ".png"):
            (out / "plots" / f"{stale}{suffix}").unlink(missing_ok=True)
    write_beside(out / "runs.csv", runs_csv(study))
    write_beside(out / "differences.csv", pairs_csv(study))
    # Earlier versions wrote TensorBoard files here, which would now be out of date.
    shutil.rmtree(out / "hparams", ignore_errors=True)


def check_place(out: Path) -> None:
    """Refuses to write a report where it would replace something else.

    Raises:
        RunDirectoryError: `out` is a file or a run's directory, or holds files and no earlier report or comparison.
    """
    if (out / "run.json").exists():
        raise RunDirectoryError(f"out={out} is the directory of a run; choose another for the report.")
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"out={out} is a file; choose another place for the report.")
    if out.is_dir() and any(out.iterdir()) and not ((out / COMPARISON_FILE).exists() or _is_report(out / "report.md")):
        raise RunDirectoryError(f"out={out} holds files, but no report; choose an empty or new directory.")


def _is_report(file: Path) -> bool:
    try:
        with open_regular(file, encoding="utf-8") as opened:
            return opened.read(len(MARK)) == MARK
    except (OSError, UnicodeDecodeError):
        return False
