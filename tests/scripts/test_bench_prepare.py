"""The benchmark of `prepare` runs, and counts the text that it was given."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT


@pytest.mark.slow
def test_it_prepares_as_much_text_as_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Sentence {i} of many.\n" for i in range(4_000)))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_prepare.py"), "a.txt", "--megabytes", "0.3"]
    out = [*command, "--vocab-size", "300", "--out", "rows.csv"]
    subprocess.run(out, cwd=tmp_path, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    with (tmp_path / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["files"], row["vocab_size"]) == ("4", "300")
    size = 4 * (tmp_path / "a.txt").stat().st_size
    assert size / 4 < int(row["tokens"]) < size
    assert 0 < float(row["peak_gb"]) < 2
