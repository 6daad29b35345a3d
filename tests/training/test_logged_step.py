"""Loggers and names of checkpoints have the number of optimizer steps done, and the last step is logged."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from training.fits import fit, rows, settings

from pkm_lightning.callbacks import MetricsCSV, StepCheckpoint


def logged(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(("interval", "steps"), [(0, []), (2, [2, 4, 5]), (50, [5])], ids=str)
def test_checkpoints_are_named_by_their_step_whatever_was_logged_last(
    tmp_path: Path, interval: int, steps: list[int]
) -> None:
    own = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    latest = StepCheckpoint(dirpath=str(tmp_path / "latest"), every_n_steps=3)
    given = settings("trainer.max_steps=5")
    made = fit(
        given, [rows(2)] * 6, max_steps=5, log_every_n_steps=interval, enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="", version="of_lightning"),
        callbacks=[MetricsCSV(path=str(tmp_path / "metrics.csv")), own, latest],
    )  # fmt: skip
    assert "step" not in made.trainer.callback_metrics
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in range(1, 6)]
    assert [path.name for path in latest_in(tmp_path)] == ["step-00000005.ckpt"]
    assert logged(tmp_path / "metrics.csv") == steps
    if steps:
        assert logged(tmp_path / "of_lightning/metrics.csv") == steps


def latest_in(folder: Path) -> list[Path]:
    return sorted((folder / "latest").iterdir())
