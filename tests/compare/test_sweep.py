"""The best learning rate of each arm, how a report tells it, and how budgets become steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningDataModule
from run_folders import FakeRun
from studies import SETTINGS
from torch.utils.data import DataLoader

from pkm_lightning.compare.budget import steps_of_tokens
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.schedule import Variant
from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.compare.study import make_study
from pkm_lightning.compare.sweep import check_swept, choose_rates, schedule_sweep
from pkm_lightning.compare.tables import sweep_table
from pkm_lightning.errors import ConfigError

SWEEP = SweepSettings(learning_rates=(0.001, 0.002, 0.004), seeds=(8, 9), data_seed=1, metric="test/loss")


def test_the_rate_with_the_lowest_mean_wins_and_failures_never(tmp_path: Path) -> None:
    runs = schedule_sweep([Variant("a", ()), Variant("b", ()), Variant("c", ())], SWEEP, [], tmp_path, {})
    losses = {
        "a": {0.001: (3.0, 3.0), 0.002: (1.0, 4.0), 0.004: (0.5, None)},
        "b": {0.001: (1.0, 1.0), 0.002: (2.0, 2.0), 0.004: (None, None)},
        "c": {0.001: (None, 1.0), 0.002: (None, 1.0), 0.004: (None, 1.0)},
    }
    for run in runs:
        assert run.learning_rate is not None
        loss = losses[run.variant][run.learning_rate][SWEEP.seeds.index(run.seed)]
        run.folder.mkdir(parents=True)
        record: dict[str, Any] = {"status": "finished", "metrics": {"test/loss": loss}}
        if run.variant == "c" and run.seed == 8:
            record = {"status": "failed", "metrics": {"test/loss": 0.1}}
        (run.folder / "run.json").write_text(json.dumps(record))
    results, chosen = choose_rates(runs, SWEEP)
    assert chosen == {"a": 0.002, "b": 0.001}
    assert results["a"] == {"0.001": 3.0, "0.002": 2.5, "0.004": None}
    assert results["c"] == {"0.001": None, "0.002": None, "0.004": None}


def test_of_recall_the_highest_mean_wins_and_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    recall = replace(SWEEP, metric="recall_paraphrase", seeds=(8,))
    runs = schedule_sweep([Variant("a", ())], recall, [], tmp_path, {})
    for run, value in zip(runs, (0.2, 0.5, 0.3), strict=True):
        run.folder.mkdir(parents=True)
        record = {"status": "finished", "metrics": {"test/recall_paraphrase": value}}
        (run.folder / "run.json").write_text(json.dumps(record))
    assert choose_rates(runs, recall)[1] == {"a": 0.002}
    check_swept(runs[0], recall)
    with pytest.raises(ConfigError, match=r"sweep.metric=test/loss is a metric of no run; .*: recall_paraphrase"):
        check_swept(runs[0], SWEEP)


def test_a_report_says_what_was_tried_on_which_data_and_where_an_edge_won(tmp_path: Path) -> None:
    results = {"a": {"0.001": 3.0, "0.002": 2.5, "0.004": None}, "b": {"0.001": 1.0, "0.002": 2.0, "0.004": 3.0}}
    sweep = {**asdict(SWEEP), "results": results, "chosen": {"a": 0.002, "b": 0.001}}
    Comparison(command=[], base=[], variants={"a": [], "b": []}, seeds=[1], sweep=sweep).save(tmp_path)
    for arm in ("a", "b"):
        FakeRun(arm, 1).write(tmp_path / "runs")

    def note() -> str:
        told = sweep_table(make_study([tmp_path], SETTINGS))
        assert told is not None
        assert told.columns == ["variant", "0.001", "0.002", "0.004"]
        assert told.rows == [["a", "3.0000", "2.5000 *", "failed"], ["b", "1.0000 * (edge)", "2.0000", "3.0000"]]
        return told.note

    def take_data_seed_of(arm: str) -> None:
        file = tmp_path / "runs" / arm / "seed-1" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        del config["data"]["seed"]
        file.write_text(yaml.safe_dump(config))

    assert "seed 8, 9 on data.seed raised by 1: another draw, where the data are facts;" in note()
    take_data_seed_of("b")
    assert "the data are facts (b: no data.seed, so the data of the reported runs);" in note()
    take_data_seed_of("a")
    assert "seed 8, 9 on the data of the reported runs;" in note()


class Rows(LightningDataModule):
    """Batches of 2 x 8 tokens, of which `real` are real."""

    def __init__(self, real: int) -> None:
        super().__init__()
        self.real = real

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        valid = torch.arange(16).view(2, 8) < self.real
        batch = {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "valid": valid}
        return DataLoader([batch] * 200, batch_size=None)


class Steps(Rows):
    """Knows optimizer steps: its batches are whole ones without a Trainer."""

    global_batch_size = 2


def config(**trainer: Any) -> dict[str, Any]:
    return {"trainer": {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, **trainer}}


def test_real_tokens_alone_make_a_budget() -> None:
    assert steps_of_tokens(1000, Rows(real=10), config()) == 100


def test_of_foreign_data_a_step_is_the_batches_of_all_ranks_and_micro_batches() -> None:
    spread = config(devices=2, num_nodes=2, accumulate_grad_batches=5)
    assert steps_of_tokens(1000, Rows(real=10), spread) == 5
    assert steps_of_tokens(1000, Steps(real=10), spread) == 100


@pytest.mark.parametrize(("budget", "real", "message"), [(3, 10, "less than a step"), (99, 0, "give no token")])
def test_a_budget_that_means_nothing_is_refused(budget: float, real: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steps_of_tokens(budget, Rows(real), config())
