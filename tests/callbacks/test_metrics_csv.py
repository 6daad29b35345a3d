"""metrics.csv keeps exactly the rows of the checkpoint that a run continues from."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pkm_lightning.callbacks import MetricsCSV
from pkm_lightning.training import LanguageModule


@pytest.fixture
def module() -> LanguageModule:
    module = LanguageModule({"seed": 1})
    module.cost = SimpleNamespace(train_flops=10)  # type: ignore[assignment]
    return module


def add(callback: MetricsCSV, module: LanguageModule, step: int, **metrics: float) -> None:
    """Appends a row as a training step of `step` would."""
    trainer: Any = SimpleNamespace(global_step=step)
    module.tokens_seen = torch.tensor(step * 5)
    callback._append(trainer, module, {f"train/{name}": torch.tensor(value) for name, value in metrics.items()})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_rows_have_step_tokens_and_flops(tmp_path: Path, module: LanguageModule) -> None:
    callback = MetricsCSV(path=str(tmp_path / "metrics.csv"))
    callback._truncate()
    add(callback, module, 3, loss=1.5)
    assert read(tmp_path / "metrics.csv") == [{"step": "3", "tokens": "15", "flops": "150", "train/loss": "1.5"}]


def test_a_new_column_keeps_the_earlier_rows(tmp_path: Path, module: LanguageModule) -> None:
    callback = MetricsCSV(path=str(tmp_path / "metrics.csv"))
    callback._truncate()
    add(callback, module, 1, loss=2.0)
    add(callback, module, 2, loss=1.0, extra=4.0)
    rows = read(tmp_path / "metrics.csv")
    assert [row["train/extra"] for row in rows] == ["", "4.0"]
    assert [row["train/loss"] for row in rows] == ["2.0", "1.0"]


def test_a_resumed_run_drops_rows_and_columns_behind_the_checkpoint(tmp_path: Path, module: LanguageModule) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path=str(path))
    first._truncate()
    add(first, module, 1, loss=2.0)
    state, at_checkpoint = first.state_dict(), path.read_bytes()
    add(first, module, 2, loss=1.0, extra=4.0)
    resumed = MetricsCSV(path=str(path))
    resumed.load_state_dict(state)
    resumed._truncate()
    assert path.read_bytes() == at_checkpoint


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path, module: LanguageModule) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,seconds,flops\n9,9,9,9\n")
    MetricsCSV(path=str(path))._truncate()
    assert read(path) == []
