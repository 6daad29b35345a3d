"""Studies of constructed runs, and their tables as cells by variant and column."""

from __future__ import annotations

from pathlib import Path

from run_folders import FakeRun

from pkm_lightning.compare.settings import ReportSettings
from pkm_lightning.compare.study import Study, make_study
from pkm_lightning.compare.tables import all_tables

SETTINGS = ReportSettings(metric="auto", resamples=200, seed=0)


def study_of(root: Path, *runs: FakeRun, metric: str = "auto") -> Study:
    for run in runs:
        run.write(root)
    return make_study([root], ReportSettings(metric=metric, resamples=200, seed=0))


def table(study: Study, title: str) -> dict[str, dict[str, str]]:
    """Returns the cells of a table by variant and column."""
    named = next(t for t in all_tables(study) if t.title.startswith(title))
    return {row[0]: dict(zip(map(str, named.columns), row, strict=True)) for row in named.rows}
