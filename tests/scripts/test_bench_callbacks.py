"""The script runs each way once per round and writes the rounds."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
from small import SMALL_DATA
from tree import ROOT


@pytest.mark.slow
def test_every_way_is_run_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    file = tmp_path / "rounds.csv"
    given = ["--steps", "2", "--rounds", "2", "--out", str(file), *SMALL_DATA, "model.memory.n_keys=8"]
    monkeypatch.setattr(sys, "argv", ["bench_callbacks.py", *given])
    script = importlib.import_module("bench_callbacks")
    script.main()
    assert "all" in capsys.readouterr().out
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["callbacks"], row["round"]) for row in rows] == [
        ("none", "1"),
        ("none", "2"),
        ("all", "1"),
        ("all", "2"),
    ]


def test_all_are_the_callbacks_that_only_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("bench_callbacks")
    config = script.configuration([], 2, "somewhere")
    ways = script.ways(config, each=True)
    assert {"slot_usage", "diagnostics", "instability", "throughput"} <= set(ways["all"])
    assert ways["none"] == []
    callbacks = script.with_callbacks(config, ways["instability"])["callbacks"]
    assert set(callbacks) == {"instability", "metrics_csv", "step_checkpoint", "progress_bar"}
