"""The script runs `fit` as a command and writes what it took and left."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
from small import SMALL_DATA
from tree import ROOT


@pytest.mark.slow
def test_a_row_per_seed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    file, overrides = tmp_path / "first.csv", [*SMALL_DATA, "model.memory.n_keys=8", "trainer.max_steps=4"]
    monkeypatch.setattr(sys, "argv", ["measure_first_run.py", "--seeds", "3", "5", "--out", str(file), *overrides])
    importlib.import_module("measure_first_run").main()
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["seed"] for row in rows] == ["3", "5"]
    for row in rows:
        assert row["overrides"] == " ".join(overrides)
        assert 0 < float(row["train_seconds"]) < float(row["seconds"])
        assert 0 <= float(row["test/recall_paraphrase"]) <= 1
        assert float(row["table0 slots"]) == 64


def test_a_run_that_fails_ends_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("measure_first_run")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match="ended with 1"):
        script.measure(1, [], tmp_path, cold=False)
