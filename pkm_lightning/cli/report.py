"""`report`: the report again, from run directories alone, on any machine; several directories are merged."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.cli.job import Job, plain
from pkm_lightning.compare.report import check_place, write_report
from pkm_lightning.compare.settings import read_report_settings
from pkm_lightning.compare.study import make_study
from pkm_lightning.errors import ConfigError


def run(job: Job) -> None:
    """Reads the runs under `runs` and writes the report into `out`."""
    folders = plain(job.config).get("runs")
    # Hydra reads a folder named 2024 as a number.
    given = [str(folder) for folder in folders] if isinstance(folders, list) else [str(folders or "")]
    if not given or not all(folder.strip() for folder in given):
        raise ConfigError("runs is not set; give the directories to report on as runs=[DIR,...].")
    if job.config.out is None or not str(job.config.out).strip():
        raise ConfigError("out is not set; give the directory of the report as out=DIR.")
    settings, out = read_report_settings(plain(job.config)), Path(str(job.config.out)).absolute()
    check_place(out)
    study = make_study([Path(folder).absolute() for folder in given], settings)
    write_report(study, out)
    print(f"{len(study.runs)} runs of {len({run.arm for run in study.runs})} variants: {out / 'report.html'}")
