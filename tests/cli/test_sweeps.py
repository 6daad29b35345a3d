"""Whole sweeps: the last step is validated, a failing run ends only itself, Optuna gets validation figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from small import SMALL_RUN, Run, record

#: The interval does not divide the steps.
QUICK = [
    *SMALL_RUN,
    *(
        "ffn=dense",
        "~callbacks.samples",
        "~callbacks.slot_usage",
        "trainer.max_steps=5",
        "trainer.val_check_interval=4",
    ),
]


def table(folder: Path) -> list[dict[str, str]]:
    """Loads sweep.csv."""
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_validates_the_last_step_and_a_refused_run_ends_only_itself(cli: Run, tmp_path: Path) -> None:
    shown = cli("fit", "-m", *QUICK, "optim.lr=-1,1e-2", "objective=val/bits_paraphrase", "run_dir=sweep")
    assert shown.code == 2
    assert shown.err.splitlines()[-1].startswith("error: optim.lr=-1 is out of range")
    refused, finished = table(tmp_path / "sweep")
    assert (refused["status"], refused["optim.lr"], refused["best"]) == ("refused", "-1", "0")
    assert (finished["status"], finished["step"], finished["best"]) == ("finished", "5", "1")
    made = record(tmp_path / "sweep" / "1")
    assert made["objective"]["mode"] == "max"
    assert made["objective"]["value"] == made["metrics"]["val/bits_paraphrase"] == float(finished["value"])
    assert made["metrics"]["test/bits_paraphrase"] != made["metrics"]["val/bits_paraphrase"]
    assert made["own_test"] is True
    assert not (tmp_path / "sweep" / "0").exists()
    # The same command again: what has ended stays, and has its value.
    command = ("fit", "-m", *QUICK, "optim.lr=-1,1e-2", "objective=val/bits_paraphrase", "run_dir=sweep")
    repeated = cli(*command)
    assert (repeated.code, record(tmp_path / "sweep" / "1")) == (2, made)
    assert table(tmp_path / "sweep") == [refused, finished]
    assert "sweep/1 is finished and keeps its val/bits_paraphrase" in repeated.err + repeated.out
    changed = cli(*command, "optim.weight_decay=0.5")
    assert "holds a run with another configuration (optim.weight_decay: " in changed.err
    assert "best: run" not in changed.out
    # Made longer alone it keeps the figure that the runs of the sweep are compared by.
    again = cli("fit", "run_dir=sweep/1", "resume=always", "trainer.max_steps=6")
    assert again.code == 0, again.err
    longer = record(tmp_path / "sweep" / "1")
    assert longer["objective"].items() >= {"name": "val/bits_paraphrase", "mode": "max", "step": 6}.items()
    assert longer["objective"]["value"] == longer["metrics"]["val/bits_paraphrase"]
    assert "val/loss" in longer["metrics"]


def test_optuna_is_told_the_direction_and_the_validation_figure(cli: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs pkm_lightning[sweeps]")
    # Hydra's sweeper ends in an error where the last cell of a grid, which Optuna shuffles, has no value.
    keys = ["hydra.sweeper.n_trials=2", "optim.lr=choice(2e-2,1e-2)"]
    wrong = cli("fit", "-m", *QUICK, "hydra/sweeper=optuna", "optim.lr=choice(-1,1e-2)", "objective=val/recall_seen")
    assert (wrong.code, "set hydra.sweeper.direction=maximize" in wrong.err) == (2, True)
    shown = cli("fit", "-m", *QUICK, "hydra/sweeper=optuna", *keys, "hydra/sweeper/sampler=grid", "run_dir=search")
    trials = table(tmp_path / "search")
    assert [trial["status"] for trial in trials] == ["finished"] * 2, shown.err
    best = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    finished = min(trials, key=lambda trial: float(trial["value"]))
    assert best["best_value"] == float(finished["value"])
    made = record(tmp_path / "search" / finished["run"])
    assert best["best_value"] == made["metrics"]["val/loss"] != made["metrics"]["test/loss"]


def test_optuna_without_any_result_ends_with_the_reasons(cli: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs pkm_lightning[sweeps]")
    keys = ["hydra.sweeper.n_trials=2", "optim.lr=choice(-1,-2)"]
    shown = cli("fit", "-m", *QUICK, "search=optuna", *keys, "run_dir=search")
    assert shown.code == 2
    assert "error: the sweep has no result (No trials are completed yet.)" in shown.err
    assert "is out of range" in shown.err
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []
