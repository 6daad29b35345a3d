"""`prepare data=invented`: facts about persons, cities and companies that do not exist."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.data.facts.invented import InventedChoice
from pkm_lightning.data.facts.invented_files import FACTS, TRAIN, write_invented
from pkm_lightning.errors import ConfigError


def run(job: Job) -> None:
    """Writes the facts, and prints what was written.

    Raises:
        ConfigError: `out` is missing, or a value is out of range.
        RunDirectoryError: `out` cannot be used.
    """
    if job.config.out is None:
        raise ConfigError("out is not set; set it to the folder to write to, out=DIR.")
    folder = Path(str(job.config.out)).absolute()
    entry = plain(job.config)["data"]
    choice = instantiate(entry, "data")
    check_kind(choice, InventedChoice, entry, "data")
    lines = write_invented(choice, folder, overwrite=job.config.overwrite)
    for name, n in lines.items():
        print(f"{name:<18} {n:>7,} lines")
    reads = f"fit data=jsonl data.path={folder / TRAIN} learns them, {folder / FACTS} has what is asked about them"
    print(f"{folder}: {'written' if lines else 'up to date'}; {reads}")
