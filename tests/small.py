"""Overrides for the smallest useful run on real facts, a few seconds per run, and readers of what a run writes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.cli.job import plain


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


#: The `cli` fixture: `cli("fit", "seed=1")` runs a command.
Run = Callable[..., Outcome]


def resolved(*overrides: str, training: bool = False) -> ResolvedRun:
    """Composes and resolves the package's own configuration with `overrides`, as a verb would."""
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        return resolve(plain(compose("config", overrides=list(overrides))), training=training)


SMALL_DATA = [
    "data.people=60",
    "data.countries=10",
    "data.cities=20",
    "data.control_subjects=5",
    "data.eval_facts=20",
    "data.vocab_size=600",
    "data.global_batch_size=12",
]
SMALL_RUN = [
    *SMALL_DATA,
    "model.memory.n_keys=16",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "callbacks.step_checkpoint.every_n_steps=4",
    "callbacks.recall.val_items=4",
    "callbacks.recall.test_items=8",
    "callbacks.samples.max_new_tokens=2",
    "~callbacks.progress_bar",
    "logger=none",
]


def record(run_dir: Path) -> dict[str, Any]:
    """Loads run.json."""
    content: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return content


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Loads metrics.csv, one dict per row."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
