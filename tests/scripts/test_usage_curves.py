"""The curves equal the runs' metrics.csv, and the drawing is well-formed."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tree import ROOT


def run_of(folder: Path, used: list[float]) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"metrics": {"recall": {"paraphrase": {"recall": 0.5}}}}))
    figures = ("used_percent", "kl_count", "gini", "top50", "top90")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", *(f"train/usage/table0/{name}" for name in figures), "val/loss"])
        for number, value in enumerate(used, start=1):
            writer.writerow([20 * number, 1000 * number, value, 1.5, 0.5, 7, 70, ""])
            writer.writerow([20 * number, 1000 * number, "", "", "", "", "", 2.0])
    return folder


def test_table_csv_and_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    runs = [run_of(tmp_path / "plain-1", [90.0, 40.0, 80.0]), run_of(tmp_path / "plain-2", [92.0, 60.0, 70.0])]
    runs.append(run_of(tmp_path / "with-x-1", [10.0, 20.0, 30.0]))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["usage_curves.py", *map(str, runs), "--out", str(out)])
    importlib.import_module("usage_curves").main()
    plain = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in plain.strip("|").split("|")]
    assert cells[:3] == ["plain (2 seeds)", "91.0 (90.0-92.0)", "50.0 (40.0-60.0)"]
    assert cells[5] == "75.0 (70.0-80.0)"
    assert cells[-1] == "50.0 (50.0-50.0)"
    with (out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert [row["used_percent"] for row in rows if (row["arm"], row["seed"]) == ("plain", "2")] == ["92", "60", "70"]
    assert len(ElementTree.parse(out / "curves.svg").findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_a_table_that_no_run_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    run = run_of(tmp_path / "plain-1", [90.0])
    with pytest.raises(SystemExit, match=r"no train/usage/layer9\.slot"):
        importlib.import_module("usage_curves").read(run, "layer9.slot")
