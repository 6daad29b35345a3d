"""The script measures each kernel of a run that has none compiled."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
from small import SMALL_DATA
from tree import ROOT


@pytest.mark.slow
def test_kernels_and_their_sum_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    file, overrides = tmp_path / "seconds.csv", " ".join([*SMALL_DATA, "model.memory.n_keys=8"])
    monkeypatch.setattr(sys, "argv", ["bench_compile.py", overrides, "--rounds", "1", "--out", str(file)])
    importlib.import_module("bench_compile").main()
    assert overrides in capsys.readouterr().out
    with file.open(newline="") as opened:
        seconds = {row["kernel"]: float(row["cpu_seconds"]) for row in csv.DictReader(opened)}
    assert "row_update.cpu._lazy_adam" in seconds
    assert seconds.pop("all") >= sum(seconds.values()) - 0.05 - 0.005 * len(seconds)
