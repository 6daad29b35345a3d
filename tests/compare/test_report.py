"""The files of a report: whole, self-contained, honest about what failed or differs, and never in the way of others."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun, ladder
from studies import SETTINGS, study_of, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pkm_lightning.compare import report
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.plots import all_plots, known_names
from pkm_lightning.compare.report import write_report
from pkm_lightning.compare.study import make_study
from pkm_lightning.errors import RunDirectoryError


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time; where plots are not what is tested, two of them do."""
    monkeypatch.setattr(report, "all_plots", lambda study: islice(all_plots(study), 2))


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


@pytest.mark.usefixtures("few_plots")
@pytest.mark.parametrize("metric", ["recall_question", "bits_paraphrase", "test/loss"])
def test_the_metric_may_be_chosen(tmp_path: Path, metric: str) -> None:
    study = study_of(tmp_path, *ladder((1, 2)), metric=metric)
    write_report(study, tmp_path / "report")
    assert study.quality.metric == metric
    assert study.multipliers["trunk"]["memory_plus"].value.sign == ">="


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
def test_how_far_a_comparison_is_and_what_was_killed_is_told(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "runs")
    FakeRun("a", 2, record={"status": "running"}).write(tmp_path / "runs")
    Comparison(command=[], base=[], arms={"a": [], "b": []}, seeds=[1, 2, 3]).save(tmp_path)
    write_report(make_study([tmp_path], SETTINGS), tmp_path)
    for name in ("report.md", "report.html"):
        assert "So far: 2 of 6 runs have begun." in (tmp_path / name).read_text()
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "interrupted"]


@pytest.mark.usefixtures("few_plots")
def test_a_report_that_was_stopped_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for what in ("all_plots", "runs_csv", "write_board"):
        with monkeypatch.context() as patch:
            patch.setattr(report, what, stop)
            with pytest.raises(KeyboardInterrupt):
                write_report(study, tmp_path / "report")
    write_report(study, tmp_path / "report")


@pytest.mark.parametrize("name", ["run.json", "thesis.tex", "report.md"])
def test_a_report_replaces_nothing_but_reports(tmp_path: Path, name: str) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1))
    out = tmp_path / "mine"
    (out / "plots").mkdir(parents=True)
    (out / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match=r"choose (another|an empty)"):
        write_report(study, out)
    assert sorted(entry.name for entry in out.iterdir()) == ["plots", name]
    assert not list((out / "plots").iterdir())


@pytest.mark.usefixtures("few_plots")
def test_own_files_beside_the_plots_stay(tmp_path: Path) -> None:
    study = study_of(tmp_path / "runs", *ladder((1,)))
    write_report(study, tmp_path / "report")
    (tmp_path / "report" / "plots" / "mine.png").write_text("precious")
    write_report(study, tmp_path / "report")
    assert (tmp_path / "report" / "plots" / "mine.png").read_text() == "precious"


@pytest.mark.usefixtures("few_plots")
def test_any_name_of_an_arm_can_be_drawn_and_written(tmp_path: Path) -> None:
    for i, name in enumerate((r"$\foo{$", "ein Löwe & <b>", "x" * 150)):
        FakeRun(name, 1, 0.1 * (i + 1)).write(tmp_path / "runs")
    FakeRun("", 1, config={"ffn": {"_target_": "y" * 300}}).write(tmp_path / "runs", "loose")
    FakeRun("", 1).write(tmp_path / "runs", "other")
    write_report(make_study([tmp_path / "runs"], SETTINGS), tmp_path / "report")
    assert len(list((tmp_path / "report" / "hparams").iterdir())) == 5
    assert "&lt;b&gt;" in (tmp_path / "report" / "report.html").read_text()


def test_every_panel_has_a_known_name(tmp_path: Path) -> None:
    assert {plot.name for plot in all_plots(study_of(tmp_path, *ladder((1,))))} == known_names()


def test_the_command_can_be_copied(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "runs")
    Comparison(command=["python", "compare", "+variants.b={ffn: moe}"], base=[], arms={"a": []}).save(tmp_path)
    write_report(make_study([tmp_path], SETTINGS), tmp_path)
    assert "python compare '+variants.b={ffn: moe}'" in (tmp_path / "report.md").read_text()


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
