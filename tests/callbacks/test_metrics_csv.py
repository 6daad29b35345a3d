"""metrics.csv keeps exactly the rows of the checkpoint that a run continues from."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from pkm_lightning.callbacks import MetricsCSV
from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
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


LOSSES: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "the last rows": (lambda content: b"".join(content.splitlines(keepends=True)[:3]), 2),
    "half a row": (lambda content: content[:-6], 3),
    "a digit": (lambda content: content[:-3], 3),
    "a row for zeros": (lambda content: content[:-12] + bytes(12), 3),
    "the file": (lambda content: b"", 0),
    "none": (lambda content: content, 4),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_lost_rows_are_reported_and_stay_lost(
    tmp_path: Path, module: LanguageModule, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    damage, n_left = LOSSES[lost]
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path=str(path))
    first._truncate()
    for step in range(1, 5):
        add(first, module, step, loss=2.0)
    path.write_bytes(damage(path.read_bytes()))
    resumed = MetricsCSV(path=str(path))
    resumed.load_state_dict(first.state_dict())
    resumed._truncate()
    assert [row["step"] for row in read(path)] == [str(step) for step in range(1, n_left + 1)]
    assert (f"{path} has {n_left} of the 4 rows" in caplog.text) == (n_left < 4)
    # Rows behind the next checkpoint are not taken for the lost ones.
    add(resumed, module, 5, loss=1.0)
    state = resumed.state_dict()
    add(resumed, module, 6, loss=1.0)
    again = MetricsCSV(path=str(path))
    again.load_state_dict(state)
    again._truncate()
    assert [row["step"] for row in read(path)][-1] == "5"


def test_rows_are_on_disk_before_the_checkpoint_that_counts_them(
    tmp_path: Path, module: LanguageModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, events = MetricsCSV(path=str(tmp_path / "metrics.csv")), list[str]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    saver = AtomicCheckpointIO()
    trainer = L.Trainer(logger=False, enable_checkpointing=False, callbacks=[callback], plugins=[saver])
    trainer.strategy.connect(module)
    trainer.strategy._lightning_module = module
    callback._truncate()
    add(callback, module, 1, loss=2.0)
    events.clear()
    trainer.save_checkpoint(tmp_path / "step-00000001.ckpt")
    assert events[0] == str(tmp_path / "metrics.csv")
    assert events[1] == str(tmp_path / "step-00000001.ckpt.tmp")
