"""`report`: writes a report from run directories alone, on any machine; several directories are merged."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.cli.job import Job, plain
from pkm_lightning.compare.report import check_place, write_report
from pkm_lightning.compare.settings import read_report_settings
from pkm_lightning.compare.study import make_study
from pkm_lightning.errors import ConfigError


def run(job: Job) -> None:
    """Reads the runs under `runs` and writes the report into `out`.

    Raises:
        ConfigError: `runs` or `out` is not set.
        RunDirectoryError: a directory holds no runs, or `out` something else than a report.
    """
    runs = plain(job.config).get("runs")
    # Hydra reads a folder named 2024 as a number.
    folders = [str(folder) for folder in runs] if isinstance(runs, list) else [str(runs or "")]
    if not folders or not all(folder.strip() for folder in folders):
        raise ConfigError("runs is not set; set it to the directories to report on, runs=[DIR,...].")
    if job.config.out is None or not str(job.config.out).strip():
        raise ConfigError("out is not set; set it to the directory of the report, out=DIR.")
    settings, out = read_report_settings(plain(job.config)), Path(str(job.config.out)).absolute()
    check_place(out)  # before minutes of reading and resampling
    study = make_study([Path(folder).absolute() for folder in folders], settings)
    write_report(study, out)
    print(f"{len(study.runs)} runs of {len({run.variant for run in study.runs})} variants: {out / 'report.html'}")
