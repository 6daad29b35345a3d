"""The report of constructed runs: numbers equal a plain recomputation, files are whole and self-contained."""

from __future__ import annotations

import csv
import json
import re
import statistics
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import FakeRun, ladder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import EXACT_FLOAT

from pkm_lightning.compare import report
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.plots import all_plots
from pkm_lightning.compare.report import write_report
from pkm_lightning.compare.settings import ReportSettings
from pkm_lightning.compare.study import Study, make_study
from pkm_lightning.compare.tables import all_tables
from pkm_lightning.errors import ConfigError

SETTINGS = ReportSettings(metric="auto", resamples=200, seed=0)


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time; where plots are not what is tested, two of them do."""
    monkeypatch.setattr(report, "all_plots", lambda study: islice(all_plots(study), 2))


def study_of(root: Path, *runs: FakeRun, metric: str = "auto") -> Study:
    for run in runs:
        run.write(root)
    return make_study([root], ReportSettings(metric=metric, resamples=200, seed=0))


def table(study: Study, title: str) -> dict[str, dict[str, str]]:
    """Cells by variant and column."""
    found = next(t for t in all_tables(study) if t.title.startswith(title))
    return {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_the_numbers_are_those_of_a_plain_recomputation(tmp_path: Path) -> None:
    """From metrics.csv, recall.csv and run.json, with nothing of the package."""
    study = study_of(tmp_path, *ladder())
    quality, costs = table(study, "Recall"), table(study, "Cost")
    for arm in ("dense_1x", "moe", "memory_plus"):
        exact, read, seconds = [], [], []
        for seed in (1, 2, 3):
            folder = tmp_path / arm / f"seed-{seed}"
            with (folder / "recall.csv").open() as file:
                hits = [int(row["exact"]) for row in csv.DictReader(file) if row["form"] == "paraphrase"]
            exact.append(sum(hits) / len(hits))
            assert quality[arm][f"seed {seed}"] == f"{exact[-1]:.1%}"
            with (folder / "metrics.csv").open() as file:
                rows = [row for row in csv.DictReader(file) if row["val/recall_paraphrase"]]
            curve = [(float(row["seconds"]), float(row["val/recall_paraphrase"])) for row in rows]
            read.append(np.interp(100.0, *zip(*curve, strict=True)))
            seconds.append(json.loads((folder / "run.json").read_text())["seconds"]["train"])
        assert quality[arm]["mean"] == f"{statistics.fmean(exact):.1%}"
        assert quality[arm]["at 100 seconds"] == f"{statistics.fmean(read):.1%}"
        assert costs[arm]["training seconds"] == f"{statistics.fmean(seconds):,.0f}"


def test_the_reference_is_the_dense_model_of_equal_compute(tmp_path: Path) -> None:
    study = study_of(tmp_path, *ladder())
    assert study.reference == "dense_1x"
    assert study.ladder == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x"]
    assert table(study, "Recall")["dense_1x"]["less dense_1x"] == ""


def test_multipliers_are_of_trunk_and_model(tmp_path: Path) -> None:
    study = study_of(tmp_path, *ladder(n_facts=400))
    mean = {arm: statistics.fmean(study.quality.value(run) for run in runs) for arm, runs in study.arms.items()}
    # MoE lies between the rungs 1x and 2x.
    share = (mean["moe"] - mean["dense_1x"]) / (mean["dense_2x"] - mean["dense_1x"])
    assert 0 < share < 1
    found = study.multipliers["trunk"]["moe"].value
    assert found.value == pytest.approx(1000 * 2**share / 1010, rel=EXACT_FLOAT)
    found = study.multipliers["model"]["moe"].value
    assert found.value == pytest.approx(1500 * (2500 / 1500) ** share / 1510, rel=EXACT_FLOAT)
    assert study.multipliers["trunk"]["memory_plus"].value.sign == ">="
    assert table(study, "Compute")["memory_plus"]["trunk, multiplier"] == ">= 4.04x"


def test_deeper_dense_models_are_no_rungs(tmp_path: Path) -> None:
    deep = FakeRun("deep", 1, ffn="Dense", flops=3000, config={"model": {"n_layers": 9}})
    assert study_of(tmp_path, *ladder((1,)), deep).ladder == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x"]


def test_without_a_ladder_there_are_no_multipliers(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("dense", 1, ffn="Dense"), FakeRun("memory_plus", 1))
    assert (study.ladder, study.multipliers, study.reference) == ([], {}, "dense")


def test_equal_time_runs_are_read_off_at_equal_tokens(tmp_path: Path) -> None:
    for run in (FakeRun("dense", 1, ffn="Dense"), FakeRun("memory_plus", 1)):
        run.write(tmp_path / "runs")
    Comparison(command=[], base=[], arms={"dense": [], "memory_plus": []}, seconds=100).save(tmp_path)
    study = make_study([tmp_path], SETTINGS)
    assert "at 1,000,000 tokens" in table(study, "Recall")["dense"]
    assert all_tables(study)[0].title.endswith("equal seconds")


def test_bits_are_per_fact_of_training_and_parameter(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("a", 1, known=1.0))
    # 8 prior bits less 0.5 for each of 1,000 facts, over 40,000 parameters of which 4,000 are active.
    assert table(study, "Storage")["a"] == {
        "variant": "a",
        "bits a fact": "7.50",
        "kbit stored": "7.5",
        "bits a parameter": "0.188",
        "bits an active parameter": "1.875",
    }


def test_runs_without_questions_are_compared_by_their_loss(tmp_path: Path) -> None:
    study = study_of(tmp_path, *(FakeRun(arm, seed, forms=()) for arm in ("a", "b") for seed in (1, 2)))
    assert study.quality.metric == "test/loss"
    assert [t.title.split()[0] for t in all_tables(study)] == ["Test/loss", "Cost"]


@pytest.mark.usefixtures("few_plots")
@pytest.mark.parametrize("metric", ["recall_question", "bits_paraphrase", "test/loss"])
def test_the_metric_may_be_chosen(tmp_path: Path, metric: str) -> None:
    study = study_of(tmp_path, *ladder((1, 2)), metric=metric)
    write_report(study, tmp_path / "report")
    assert study.quality.metric == metric
    assert study.multipliers["trunk"]["memory_plus"].value.sign == ">="


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a figure of no run; allowed: auto, .*Did you mean 'recall_paraphrase'"):
        study_of(tmp_path, FakeRun("a", 1), metric="recall_paraphrases")


class Page(HTMLParser):
    """What a page would load, and the text that it shows in red."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.warnings = ""
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(given[key]) for key in ("src", "href", "xlink:href") if given.get(key)]
        if tag == "section":
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.warnings += data


def page(folder: Path) -> Page:
    parsed = Page()
    parsed.feed((folder / "report.html").read_text())
    return parsed


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(study_of(tmp_path / "runs", *ladder()), out)
    text = (out / "report.html").read_text()
    assert all(target.startswith(("#", "data:,")) for target in page(out).loads)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<svg") == len(list((out / "plots").glob("*.svg"))) == len(list((out / "plots").glob("*.png")))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.usefixtures("few_plots")
def test_every_drawing_says_what_it_is_and_takes_the_pages_colour(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(study_of(tmp_path / "runs", *ladder((1,))), out)
    text = (out / "report.html").read_text()
    assert text.count('role="img" aria-label="') == text.count("<svg")
    assert "currentColor" in text
    assert "#1b1f24" not in text.split("</style>", 1)[1]


@pytest.mark.usefixtures("few_plots")
def test_a_fair_comparison_warns_of_nothing(tmp_path: Path) -> None:
    write_report(study_of(tmp_path / "runs", *ladder()), tmp_path / "report")
    assert page(tmp_path / "report").warnings == ""
    assert "Warning" not in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("few_plots")
@pytest.mark.parametrize(
    ("config", "key"),
    [({"data": {"global_batch_size": 24}}, "data.global_batch_size"), ({"data": {"seed": 7}}, "data.seed"),
     ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision")],
)  # fmt: skip
def test_runs_that_secretly_differ_are_warned_of_in_red(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    runs = ladder((1, 2))
    runs[-1].config = config
    write_report(study_of(tmp_path / "runs", *runs), tmp_path / "report")
    assert key in page(tmp_path / "report").warnings
    assert f"`{key}`" in (tmp_path / "report" / "report.md").read_text().split("##")[0]


@pytest.mark.usefixtures("few_plots")
def test_failed_runs_are_shown_with_their_reason_and_the_rest_is_reported(tmp_path: Path) -> None:
    failed = FakeRun("peer", 1, record={"status": "failed", "reason": "CUDA out of <memory>"})
    nan = FakeRun("moe", 3, record={"metrics": {"test/loss": None}})
    runs = [run for run in ladder() if (run.arm, run.seed) != ("moe", 3)]
    study = study_of(tmp_path / "runs", *runs, failed, nan)
    write_report(study, tmp_path / "report")
    warnings = page(tmp_path / "report").warnings
    assert "peer seed 1" in warnings
    assert "CUDA out of <memory>" in warnings
    assert "moe seed 3" in warnings
    quality = table(study, "Recall")
    assert quality["moe"]["seed 3"] == "-"
    assert "peer" not in quality
    with (tmp_path / "report" / "runs.csv").open() as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 19
    assert rows["peer", "1"]["status"] == rows["moe", "3"]["status"] == "failed"


def test_when_all_runs_failed_there_is_still_a_report(tmp_path: Path) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1, record={"status": "failed", "reason": "no disk"}))
    write_report(study, tmp_path / "report")
    assert "no disk" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("few_plots")
def test_a_plugin_without_a_cost_is_reported_without_it(tmp_path: Path) -> None:
    strange = FakeRun("mine", 1, 0.5, ffn="Mine", record={"unknown_cost": ["Mine"]})
    study = study_of(tmp_path / "runs", *ladder((1,)), strange)
    write_report(study, tmp_path / "report")
    assert table(study, "Cost")["mine"]["FLOPs a token, trunk forward"] == "-"
    assert "mine" not in study.multipliers["trunk"]


@pytest.mark.usefixtures("few_plots")
def test_text_of_runs_cannot_become_markup(tmp_path: Path) -> None:
    evil = FakeRun("a", 1, record={"status": "failed", "reason": "<script>alert(1)</script> | x"})
    write_report(study_of(tmp_path / "runs", FakeRun("b", 1), evil), tmp_path / "report")
    assert "<script" not in (tmp_path / "report" / "report.html").read_text()
    assert r"</script> \| x |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("few_plots")
def test_the_same_runs_give_the_same_report(tmp_path: Path) -> None:
    for run in ladder((1, 2)):
        run.write(tmp_path / "runs")
    written = []
    for name in ("one", "two"):
        write_report(make_study([tmp_path / "runs"], SETTINGS), tmp_path / name)
        files = sorted(f for f in (tmp_path / name).rglob("*") if f.suffix in (".html", ".md", ".csv", ".svg"))
        written.append([(f.name, f.read_text()) for f in files])
    assert written[0] == written[1]


@pytest.mark.usefixtures("few_plots")
def test_a_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_report(study_of(tmp_path / "runs", *ladder((1,))), tmp_path / "report")
    loose = study_of(tmp_path / "loose", FakeRun("a", 1, forms=()))
    write_report(loose, tmp_path / "report")
    assert not (tmp_path / "report" / "plots" / "quality_by_compute.svg").exists()
    assert [entry.name for entry in (tmp_path / "report" / "hparams").iterdir()] == ["a-seed-1"]
    assert not list((tmp_path / "report").rglob("*.tmp"))


@pytest.mark.usefixtures("few_plots")
def test_the_board_has_a_row_a_run(tmp_path: Path) -> None:
    study = study_of(tmp_path / "runs", *ladder((1, 2)))
    write_report(study, tmp_path / "report")
    folders = sorted((tmp_path / "report" / "hparams").iterdir())
    assert len(folders) == 12
    events = EventAccumulator(str(folders[0])).Reload()
    (value,) = [event.value for event in events.Scalars("hparam/recall_paraphrase")]
    assert value == pytest.approx(study.quality.value(study.arms["dense_0.5x"][0]))
    assert "_hparams_/session_start_info" in events.summary_metadata
