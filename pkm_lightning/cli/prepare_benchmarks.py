"""`prepare data=benchmarks`: public question sets out of packages, with tasks for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import ListConfig

from pkm_lightning.cli.job import Job
from pkm_lightning.data.benchmarks import SetReport, prepare_benchmarks
from pkm_lightning.errors import ConfigError


def run(job: Job) -> None:
    """Prepares the question sets, and prints what was written, what was not, and why.

    Raises:
        ConfigError: a key that is missing or unknown.
        DataError: a package that is missing or damaged.
        RunDirectoryError: `out` cannot be used.
    """
    if job.sets("overwrite"):
        raise ConfigError("overwrite is not for data=benchmarks, which renews what has changed; leave it out.")
    packages, out = job.config.packages, job.config.out
    if packages is None:
        raise ConfigError(
            "packages is not set; to tokenise data for fit, choose them: data=text data.path=PATH (or jsonl, hf); for "
            "the question sets of data=benchmarks give the folder with the files of the packages, packages=DIR."
        )
    if out is None:
        raise ConfigError("out is not set; set it to the folder to write to, out=DIR.")
    sets = job.config.sets
    names = None if sets is None else [str(name) for name in (sets if isinstance(sets, ListConfig) else [sets])]
    folder = Path(str(out)).absolute()
    reports = prepare_benchmarks(Path(str(packages)).absolute(), folder, names)
    print_reports(reports, packages)
    is_new = any(report.status == "written" for report in reports)
    print(f"{folder}: {'written' if is_new else 'up to date'}; evaluate tasks_dir={folder} reads it")


def print_reports(reports: Sequence[SetReport], packages: str) -> None:
    """Prints a table of the splits, and a line for each remark."""
    rows = [("set", "split", "rows", "left out", "sha256", "package", "licence of the set")]
    notes = []
    for report in reports:
        one = report.of
        package = f"{one.package.name} {one.package.version} ({one.package.licence})"
        for split in report.splits:
            left_out = str(split.skipped.total())
            rows.append((one.name, split.name, f"{split.rows:,}", left_out, split.sha256[:16], package, one.licence))
            notes += [f"{one.name} {split.name}: {n:,} left out: {why}" for why, n in split.skipped.items()]
        if report.status == "missing":
            command = one.package.command(packages)
            notes.append(f"{one.name}: not prepared, its package is missing; run: {command}")
        notes += [f"{one.name}: {remark}" for remark in (*filter(None, [one.remark]), *report.remarks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            f"{text:>{w}}" if i in (2, 3) else f"{text:<{w}}"
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print("\n".join(notes))
