"""A sweep of learning rates: its runs, the best rate of each variant, and its table in a report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from run_folders import FakeRun
from studies import SETTINGS

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.schedule import Variant
from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.compare.study import make_study
from pkm_lightning.compare.sweep import choose_rates, schedule_sweep
from pkm_lightning.compare.tables import sweep_table

SWEEP = SweepSettings(learning_rates=(0.001, 0.002, 0.004), seeds=(8, 9), draw=1, metric="val/loss")


def objective(name: str, value: float | None) -> dict[str, Any]:
    """Returns what run.json has of an objective; None for one that was not finite."""
    return {"objective": {"name": name, "mode": "min", "value": value, "step": 5}}


def test_a_sweep_gives_every_variant_the_same_rates_seeds_and_other_subjects() -> None:
    variants = [Variant("a", ("ffn=dense",)), Variant("b", ("ffn=moe",))]
    runs = schedule_sweep(variants, SWEEP, ["data.draw=2"], Path("out"), {"a": 2, "b": 2})
    assert {(run.variant, run.learning_rate, run.seed) for run in runs} == {
        (variant, rate, seed) for variant in ("a", "b") for rate in SWEEP.learning_rates for seed in SWEEP.seeds
    }
    assert all("data.draw=3" in run.overrides and "data.draw=2" not in run.overrides for run in runs)
    assert all("objective=val/loss" in run.overrides for run in runs)
    assert len({run.folder for run in runs}) == len(runs) == len({run.label for run in runs})


def test_data_without_draws_are_swept_as_they_are() -> None:
    (first, *_) = schedule_sweep([Variant("a", ("ffn=dense",))], SWEEP, [], Path("out"), {})
    assert not any(override.startswith("data.") for override in first.overrides)


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
        # The test says otherwise, and must not be heard.
        record = {"status": "finished", **objective("val/loss", loss), "metrics": {"test/loss": 1 / (loss or 1)}}
        if run.variant == "c" and run.seed == 8:
            record = {"status": "failed", **objective("val/loss", 0.1)}
        (run.folder / "run.json").write_text(json.dumps(record))
    results, chosen = choose_rates(runs, SWEEP)
    assert chosen == {"a": 0.002, "b": 0.001}
    assert results["a"] == {"0.001": 3.0, "0.002": 2.5, "0.004": None}
    assert results["c"] == {"0.001": None, "0.002": None, "0.004": None}


def test_the_highest_mean_of_recall_wins_and_other_objectives_do_not_count(tmp_path: Path) -> None:
    recall = replace(SWEEP, metric="val/recall_paraphrase", seeds=(8,))
    runs = schedule_sweep([Variant("a", ())], recall, [], tmp_path, {})
    for run, value in zip(runs, (0.2, 0.5, 0.3), strict=True):
        run.folder.mkdir(parents=True)
        record = {"status": "finished", **objective(recall.metric, value)}
        (run.folder / "run.json").write_text(json.dumps(record))
    assert choose_rates(runs, recall)[1] == {"a": 0.002}
    assert choose_rates(runs, SWEEP)[1] == {}


def test_a_report_shows_the_rates_the_data_and_where_an_edge_won(tmp_path: Path) -> None:
    results = {"a": {"0.001": 3.0, "0.002": 2.5, "0.004": None}, "b": {"0.001": 1.0, "0.002": 2.0, "0.004": 3.0}}
    sweep = {**asdict(SWEEP), "results": results, "chosen": {"a": 0.002, "b": 0.001}}
    for variant in ("a", "b"):
        FakeRun(variant, 1).write(tmp_path / "runs")

    def note(**changed: Any) -> str:
        content = {**sweep, **changed}
        if "data_seed" in changed:
            del content["draw"]
        Comparison(command=[], base=[], variants={"a": [], "b": []}, seeds=[1], sweep=content).save(tmp_path)
        table = sweep_table(make_study([tmp_path], SETTINGS))
        assert table is not None
        assert [column.name for column in table.columns] == ["variant", "0.001", "0.002", "0.004"]
        assert table.rows == [["a", "3.0000", "2.5000 *", "failed"], ["b", "1.0000 * (edge)", "2.0000", "3.0000"]]
        return table.note

    def set_data(variant: str, **values: Any) -> None:
        file = tmp_path / "runs" / variant / "seed-1" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**config, "data": {**config["data"], **values}}))

    assert "seed 8, 9 on data.seed raised by 7: another draw, where the data are facts;" in note(data_seed=7)
    set_data("a", draw=0)
    assert "on data.draw raised by 1: none of the reported subjects (b: no data.draw, so the data of the" in note()
    set_data("b", draw=0)
    assert "seed 8, 9 on data.draw raised by 1: none of the reported subjects;" in note()
    assert "seed 8, 9 on the data of the reported runs;" in note(draw=0)
    record = tmp_path / "runs" / "a" / "seed-1" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "own_test": False}))
    assert "on the data of the reported runs, whose validations read what their test reads;" in note(draw=0)
