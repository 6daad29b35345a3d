"""The numbers of constructed runs equal a plain recomputation; the reference, the ladder and what is left out."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import FakeRun, ladder
from studies import SETTINGS, study_of, table
from tolerances import EXACT_FLOAT

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.runs_csv import runs_csv
from pkm_lightning.compare.settings import read_report_settings
from pkm_lightning.compare.study import make_study
from pkm_lightning.compare.tables import all_tables
from pkm_lightning.errors import ConfigError


def test_the_numbers_equal_a_plain_recomputation(tmp_path: Path) -> None:
    """Recomputes from metrics.csv, recall.csv and run.json, without the package."""
    study = study_of(tmp_path, *ladder())
    quality, costs = table(study, "Recall"), table(study, "Cost")
    each = table(study, "Recall of held-out paraphrases of each run")
    for variant in ("dense_1x", "moe", "memory_plus"):
        exact, read, seconds = [], [], []
        for seed in (1, 2, 3):
            folder = tmp_path / variant / f"seed-{seed}"
            with (folder / "recall.csv").open() as file:
                hits = [int(row["exact"]) for row in csv.DictReader(file) if row["form"] == "paraphrase"]
            exact.append(sum(hits) / len(hits))
            assert each[variant][f"seed: {seed}"] == f"{exact[-1]:.1%}"
            with (folder / "metrics.csv").open() as file:
                rows = [row for row in csv.DictReader(file) if row["val/recall_paraphrase"]]
            curve = [(float(row["seconds"]), float(row["val/recall_paraphrase"])) for row in rows]
            read.append(np.interp(100.0, *zip(*curve, strict=True)))
            seconds.append(json.loads((folder / "run.json").read_text())["seconds"]["train"])
        assert quality[variant]["mean"] == f"{statistics.fmean(exact):.1%}"
        assert quality[variant]["at 100 seconds"] == f"{statistics.fmean(read):.1%}"
        assert costs[variant]["training: seconds"] == f"{statistics.fmean(seconds):,.0f}"


def test_the_reference_is_the_dense_model_of_equal_compute(tmp_path: Path) -> None:
    study = study_of(tmp_path, *ladder())
    assert study.reference == "dense_1x"
    assert study.ladder == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x"]
    assert table(study, "Recall")["dense_1x"]["difference from dense_1x, points"] == ""


def test_multipliers_of_trunk_model_and_seconds(tmp_path: Path) -> None:
    study = study_of(tmp_path, *ladder(n_facts=400))
    mean = {
        variant: statistics.fmean(study.quality.value(run) for run in runs) for variant, runs in study.variants.items()
    }
    # MoE lies between the rungs 1x and 2x.
    share = (mean["moe"] - mean["dense_1x"]) / (mean["dense_2x"] - mean["dense_1x"])
    assert 0 < share < 1
    multiplier = study.multipliers["trunk"]["moe"].value
    assert multiplier.value == pytest.approx(1000 * 2**share / 1010, rel=EXACT_FLOAT)
    multiplier = study.multipliers["model"]["moe"].value
    assert multiplier.value == pytest.approx(1500 * (2500 / 1500) ** share / 1510, rel=EXACT_FLOAT)
    multiplier = study.multipliers["time"]["moe"].value
    assert multiplier.value == pytest.approx(100 * math.sqrt(2) ** share / 150, rel=EXACT_FLOAT)
    of_processors = study.multipliers["processor"]["moe"].value
    assert of_processors.value == pytest.approx(multiplier.value, rel=EXACT_FLOAT)
    assert study.multipliers["trunk"]["memory_plus"].value.sign == ">="
    shown = table(study, "Compute")
    assert shown["moe"]["training seconds: cost over dense_1x"] == "1.50x"
    assert shown["memory_plus"]["FLOPs of the trunk: multiplier"].startswith(">= 4.04x (")


def test_runs_of_several_processes_have_no_multiplier_of_processor_seconds(tmp_path: Path) -> None:
    for run in ladder((1,)):
        run.record["seconds"] = {"processor": None}
        run.write(tmp_path)
    study = study_of(tmp_path)
    assert list(study.multipliers) == ["trunk", "model", "time"]
    assert not any("processor" in column for column in table(study, "Compute")["moe"])
    assert "training: processor seconds" not in table(study, "Cost")["moe"]


@pytest.mark.parametrize(
    "odd",
    [{"config": {"trainer": {"max_steps": 30}}}, {"config": {"data": {"global_batch_size": 7}}}],
    ids=["steps", "batch"],
)
def test_a_rung_differs_only_in_its_size(tmp_path: Path, odd: dict[str, Any]) -> None:
    study = study_of(tmp_path, *ladder((1,)), FakeRun("cheap", 1, ffn="Dense", flops=3000, **odd))
    assert study.ladder == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x"]


def test_deeper_dense_models_are_no_rungs(tmp_path: Path) -> None:
    deep = FakeRun("deep", 1, ffn="Dense", flops=3000, config={"model": {"n_layers": 9}})
    assert study_of(tmp_path, *ladder((1,)), deep).ladder == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x"]


def test_without_a_ladder_there_are_no_multipliers(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("dense", 1, ffn="Dense"), FakeRun("memory_plus", 1))
    assert (study.ladder, study.multipliers, study.reference) == ([], {}, "dense")


def test_equal_time_runs_are_interpolated_at_equal_tokens(tmp_path: Path) -> None:
    for run in (FakeRun("dense", 1, ffn="Dense"), FakeRun("memory_plus", 1)):
        run.write(tmp_path / "runs")
    fewer = {"trainer": {"max_steps": 60, "val_check_interval": 6}}
    FakeRun("dense_2x", 1, ffn="Dense", flops=2000, config=fewer).write(tmp_path / "runs")
    Comparison(command=[], base=[], variants={"dense": [], "dense_2x": [], "memory_plus": []}, seconds=100).save(
        tmp_path
    )
    study = make_study([tmp_path], SETTINGS)
    assert (study.ladder, study.multipliers) == ([], {})
    assert not study.unfair
    assert "at 1.00 M tokens" in table(study, "Recall")["dense"]
    assert all_tables(study)[0].title.endswith("equal seconds")


def test_bits_per_fact_of_training_and_per_parameter(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("a", 1, known=1.0))
    # 8 prior bits less 0.5 for each of 1,000 facts, over 40,000 parameters of which 4,000 are active.
    assert table(study, "Storage")["a"] == {
        "variant": "a",
        "bits per fact": "7.50",
        "stored, kbit": "7.5",
        "bits per parameter: total": "0.188",
        "bits per parameter: active": "1.875",
    }


def test_bits_stored_of_known_entropy(tmp_path: Path) -> None:
    figures = {"bits_person": 60.0, "bits_person_clipped": 61.25, "stored_bits": 6e5, "stored_share": 0.5}
    figures |= {"bits_per_parameter": 2.0, "bits_per_active_parameter": 4.0, "bits_per_byte": 0.5}
    of_tables = {"bits_per_byte_int8": 1.5}
    runs = [
        FakeRun(variant, seed, forms=(), record={"metrics": {f"test/{k}": seed * v for k, v in of_run.items()}})
        for variant, of_run in (("dense", figures), ("memory_plus", figures | of_tables))
        for seed in (1, 2)
    ]
    study = study_of(tmp_path, *runs, metric="bits_per_parameter")
    assert study.quality.label == "bits per parameter"
    # Means over both seeds; a width that no run has is no column, and a run without tables has none of theirs.
    expected = {
        "variant": "dense", "bits per person": "90.0", "clipped": "91.9", "kbit stored": "900.0",
        "of all there are": "75.0%", "bits per parameter": "3.000", "per active parameter": "6.000",
        "per byte": "0.750", "per byte, tables int8": "-",
    }  # fmt: skip
    shown = table(study, "Storage")
    assert shown["dense"] == expected
    assert shown["memory_plus"] == {**expected, "variant": "memory_plus", "per byte, tables int8": "2.250"}


def test_runs_without_questions_are_compared_by_their_loss(tmp_path: Path) -> None:
    study = study_of(tmp_path, *(FakeRun(variant, seed, forms=()) for variant in ("a", "b") for seed in (1, 2)))
    assert study.quality.metric == "test/loss"
    assert [t.title.split()[0] for t in all_tables(study)] == ["Test/loss", "Differences", "Cost", "Test/loss"]


def test_a_run_without_answers_fails_and_does_not_change_the_metric(tmp_path: Path) -> None:
    study = study_of(tmp_path, *ladder((1, 2)), FakeRun("silent", 1, forms=()))
    assert study.quality.metric == "recall_paraphrase"
    assert [(run.variant, run.failure) for run in study.failed] == [("silent", "finished without recall_paraphrase")]


def test_data_without_a_test_are_compared_by_their_last_validation(tmp_path: Path) -> None:
    for variant, loss in (("a", 0.25), ("b", 0.5)):
        folder = FakeRun(variant, 1, forms=()).write(tmp_path)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "metrics": {"val/loss": loss}}))
    study = make_study([tmp_path], SETTINGS)
    assert study.quality.metric == "val/loss"
    assert study.resampled is not None
    assert study.resampled.mean == {"a": 0.25, "b": 0.5}


@pytest.mark.parametrize("spelling", ["recall_question", "test/recall_question", "bits_paraphrase", "test/loss"])
def test_the_metric_may_be_chosen_and_keeps_its_direction(tmp_path: Path, spelling: str) -> None:
    metric = read_report_settings({"report": {"metric": spelling}}).metric
    study = study_of(tmp_path, *ladder((1,)), metric=metric)
    assert study.quality.metric == metric
    assert study.multipliers["trunk"]["memory_plus"].value.sign == ">="


def test_a_single_value_has_no_interval(tmp_path: Path) -> None:
    runs = [FakeRun(variant, 1, known, ffn, flops, forms=()) for variant, known, ffn, flops in
            (("d1", 0.2, "Dense", 500), ("d2", 0.6, "Dense", 1000), ("m", 0.4, "MemoryPlus", 600))]  # fmt: skip
    study = study_of(tmp_path, *runs)
    shown = table(study, "Test/loss")["m"]
    assert (shown["95% interval"], shown["difference from d1"]) == ("-", "-0.200")
    assert "(" not in table(study, "Compute")["m"]["FLOPs of the trunk: multiplier"]
    assert "there is no interval" in all_tables(study)[0].note


def test_the_resampled_units_are_named(tmp_path: Path) -> None:
    over = [study_of(tmp_path / str(i), *runs).resampled for i, runs in enumerate((
        [FakeRun("a", 1)], [FakeRun("a", 1, forms=()), FakeRun("a", 2, forms=())], [FakeRun("a", 1), FakeRun("a", 2)],
    ))]  # fmt: skip
    assert [resampled.over for resampled in over if resampled] == ["facts", "seeds", "facts and seeds"]


def test_unequal_runs_are_called_unequal(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("a", 1), FakeRun("b", 1, record={"tokens": 300_000}))
    assert all_tables(study)[0].title.endswith("at unequal tokens")


def test_seeds_are_counted_within_a_variant(tmp_path: Path) -> None:
    runs = [FakeRun("a", seed) for seed in (1, 2)] + [FakeRun("b", seed) for seed in (3, 4)]
    assert "2 seeds understate" in all_tables(study_of(tmp_path / "two", *runs))[0].note
    assert (
        "with one seed it does not include how much seeds differ"
        in all_tables(study_of(tmp_path / "one", *runs[1:]))[0].note
    )


def test_a_mean_over_some_seeds_only_is_not_shown(tmp_path: Path) -> None:
    """Leaves the cell empty: the second seed's first validation comes after the moment."""
    slow = FakeRun("slow", 2, seconds=5000.0)
    study = study_of(tmp_path, FakeRun("d", 1, ffn="Dense"), FakeRun("d", 2, ffn="Dense"), FakeRun("slow", 1), slow)
    assert table(study, "Recall")["slow"]["at 100 seconds"] == "-"


@pytest.mark.parametrize(
    ("forms", "names", "column"),
    [
        (
            ("paraphrase",),
            ["test/recall_paraphrase_without_table"],
            "other means: recall of held-out paraphrases, without table",
        ),
        ((), ["test/loss_without_table", "test/perplexity_without_table"], "other means: test/loss, without table"),
    ],
)
def test_a_report_shows_what_is_left_without_the_table(
    forms: tuple[str, ...], names: list[str], column: str, tmp_path: Path
) -> None:
    metrics = {"metrics": dict.fromkeys(names, 0.25)}
    runs = [FakeRun("m", seed, forms=forms, record=metrics) for seed in (1, 2)]
    study = study_of(tmp_path / "new", *runs, FakeRun("d", 1, ffn="Dense", forms=forms))
    quality = all_tables(study)[0]
    cells = {row[0]: row[[str(c) for c in quality.columns].index(column)] for row in quality.rows}
    assert cells == {"m": "25.0%" if forms else "0.250", "d": "-"}
    assert "with every read of a value table set to zero" in quality.note
    assert names[0] in runs_csv(study).splitlines()[0].split(",")
    earlier = all_tables(study_of(tmp_path / "old", FakeRun("m", 1, forms=forms), FakeRun("d", 1, forms=forms)))[0]
    assert not [name for name in map(str, earlier.columns) if "without" in name]
    assert "without table" not in earlier.note.lower()
    mixed = [runs[0], FakeRun("m", 2, forms=forms), *(FakeRun("d", s, ffn="Dense", forms=forms) for s in (1, 2))]
    cells = table(study_of(tmp_path / "mixed", *mixed), quality.title)
    assert [cells[name][column] for name in ("m", "d")] == [f"{'25.0%' if forms else '0.250'} (1 of 2 seeds)", "-"]


def test_a_report_can_be_about_what_is_left_without_the_table(tmp_path: Path) -> None:
    name = "recall_paraphrase_without_table"
    runs = [FakeRun("m", seed, record={"metrics": {f"test/{name}": seed / 4}}) for seed in (1, 2)]
    study = study_of(tmp_path, *runs, metric=name)
    assert table(study, "Recall of held-out paraphrases, without table")["m"]["mean"] == "37.5%"
    assert read_report_settings({"report": {"metric": "test/loss_without_table"}}).metric == "test/loss_without_table"


def test_a_finished_run_without_the_metric_has_failed(tmp_path: Path) -> None:
    lacking = FakeRun("b", 1, forms=(), record={"metrics": {"test/loss": 0.3}})
    study = study_of(tmp_path, FakeRun("a", 1), lacking, metric="recall_paraphrase")
    assert [(run.variant, run.failure) for run in study.failed] == [("b", "finished without recall_paraphrase")]


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a metric of no run; allowed: auto, .*Did you mean 'recall_paraphrase'"):
        study_of(tmp_path, FakeRun("a", 1), metric="recall_paraphrases")
