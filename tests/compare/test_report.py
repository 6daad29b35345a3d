"""The files of a report: whole, self-contained, explicit about failures and differences, and never in others' way."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun, ladder
from studies import SETTINGS, study_of, table

from pkm_lightning.compare import pages, plots, report
from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.plots import all_plots, known_names
from pkm_lightning.compare.report import write_report
from pkm_lightning.compare.study import make_study
from pkm_lightning.errors import RunDirectoryError


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the panels out: drawing takes most of a report's time."""
    monkeypatch.setattr(plots, "all_plots", lambda study: ())


class Page(HTMLParser):
    """What a page would load, and the text of its warnings."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.warnings = ""
        self._depth = 0
        self.feed((folder / "report.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.targets += [str(values[key]) for key in ("src", "href", "xlink:href") if values.get(key)]
        if tag == "section":
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.warnings += data


def test_a_whole_report_is_one_page_that_loads_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    """Draws every panel once: known names, one SVG and PNG each, described and in the page's colour."""
    out = tmp_path / "report"
    write_report(study_of(tmp_path / "runs", *ladder((1,))), out)
    page, text = Page(out), (out / "report.html").read_text()
    assert all(target.startswith(("#", "data:,")) for target in page.targets)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert {file.stem for file in (out / "plots").glob("*.svg")} == known_names()
    assert {file.stem for file in (out / "plots").glob("*.png")} == known_names()
    assert text.count("<svg") == text.count('role="img" aria-label="') == len(known_names())
    assert "currentColor" in text
    assert "#1b1f24" not in text.split("</style>", 1)[1]
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert page.warnings == ""
    assert "Warning" not in (out / "report.md").read_text()
    assert {entry.name for entry in out.iterdir()} == {
        *("plots", "report.html", "report.md", "runs.csv", "differences.csv"),
    }


def test_a_drawing_is_the_same_each_time_for_any_name_of_a_variant(tmp_path: Path) -> None:
    for i, name in enumerate((r"$\foo{$", "ein Löwe & <b>", "x" * 150)):
        FakeRun(name, 1, 0.1 * (i + 1)).write(tmp_path / "runs")
    FakeRun("", 1, config={"ffn": {"_target_": "y" * 300}}).write(tmp_path / "runs", "loose")
    FakeRun("", 1).write(tmp_path / "runs", "other")
    study = make_study([tmp_path / "runs"], SETTINGS)
    first, again = next(all_plots(study)), next(all_plots(study))
    assert first == again
    assert "ein Löwe &amp; &lt;b&gt;" in pages.render_pages(study, [first], report.MARK)["report.html"]


@pytest.mark.filterwarnings("error")
def test_long_names_of_a_sweep_leave_room_for_the_axes(tmp_path: Path) -> None:
    for i in range(4):
        name = f"memory_plus ffn.heads={i} model.memory.heads={i} optim.lr=0.00{i}123 optim.table_lr_factor={i}"
        FakeRun(name, 1, 0.1 * (i + 1)).write(tmp_path / "runs")
    assert len(list(all_plots(make_study([tmp_path / "runs"], SETTINGS)))) > 3


@pytest.mark.usefixtures("no_plots")
def test_unfair_differences_are_warned_of_in_red(tmp_path: Path) -> None:
    runs = ladder((1,))
    runs[-1].config = {"trainer": {"precision": "bf16-mixed"}, "data": {"seed": 7}}
    write_report(study_of(tmp_path / "runs", *runs), tmp_path / "report")
    for key in ("trainer.precision", "data.seed"):
        assert key in Page(tmp_path / "report").warnings
        assert f"`{key}`" in (tmp_path / "report" / "report.md").read_text().split("##")[0]


@pytest.mark.usefixtures("no_plots")
def test_failed_runs_are_shown_with_their_reason_and_the_rest_is_reported(tmp_path: Path) -> None:
    failed = FakeRun("peer", 1, record={"status": "failed", "reason": "CUDA out of <script>memory</script> | x"})
    diverged = FakeRun("moe", 2, record={"metrics": {"test/loss": None}})
    runs = [run for run in ladder((1, 2)) if (run.variant, run.seed) != ("moe", 2)]
    study = study_of(tmp_path / "runs", *runs, failed, diverged)
    write_report(study, tmp_path / "report")
    warnings = Page(tmp_path / "report").warnings
    assert "peer seed 1" in warnings
    assert "CUDA out of <script>memory</script> | x" in warnings
    assert "moe seed 2" in warnings
    # Texts of runs must not become markup.
    assert "<script" not in (tmp_path / "report" / "report.html").read_text()
    assert r"</script> \| x |" in (tmp_path / "report" / "report.md").read_text()
    quality = table(study, "Recall of held-out paraphrases of each run")
    assert quality["moe"]["seed: 2"] == "-"
    assert "peer" not in quality
    with (tmp_path / "report" / "runs.csv").open() as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 13
    assert rows["peer", "1"]["status"] == rows["moe", "2"]["status"] == "failed"


def test_a_report_of_failed_runs_alone_is_written(tmp_path: Path) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1, record={"status": "failed", "reason": "no disk"}))
    write_report(study, tmp_path / "report")
    assert "no disk" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_plots")
def test_a_plugin_without_a_cost_is_reported_without_it(tmp_path: Path) -> None:
    strange = FakeRun("mine", 1, 0.5, ffn="Mine", record={"unknown_cost": ["Mine"]})
    study = study_of(tmp_path / "runs", *ladder((1,)), strange)
    write_report(study, tmp_path / "report")
    assert table(study, "Cost")["mine"]["FLOPs per token: trunk, forward"] == "-"
    assert "mine" not in study.multipliers["trunk"]


def test_a_report_replaces_an_earlier_one_and_leaves_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [plots.Plot(name, name, "<svg></svg>", b"png") for name in ("quality_by_compute", "recall_by_decile")]
    monkeypatch.setattr(plots, "all_plots", lambda study: drawn[: len(study.ladder)])
    out = tmp_path / "report"
    study = study_of(tmp_path / "runs", *ladder((1,)))
    write_report(study, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    texts = [path.read_bytes() for path in files]
    (out / "plots" / "mine.png").write_text("precious")
    (out / "hparams").mkdir()  # written by earlier versions
    write_report(study, out)
    assert [path.read_bytes() for path in files] == texts, "the same runs give the same report"
    write_report(study_of(tmp_path / "loose", FakeRun("a", 1, forms=())), out)
    assert [path.name for path in (out / "plots").iterdir()] == ["mine.png"]
    assert not (out / "hparams").exists()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.usefixtures("no_plots")
def test_the_state_of_a_comparison_and_its_command_are_shown(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "runs")
    FakeRun("a", 2, record={"status": "running"}).write(tmp_path / "runs")
    command = ["python", "compare", "+variants.b={ffn: moe}"]
    Comparison(command=command, base=[], variants={"a": [], "b": []}, seeds=[1, 2, 3]).save(tmp_path)
    write_report(make_study([tmp_path], SETTINGS), tmp_path)
    for name in ("report.md", "report.html"):
        assert "So far: 2 of 6 runs have started." in (tmp_path / name).read_text()
    assert "python compare '+variants.b={ffn: moe}'" in (tmp_path / "report.md").read_text()
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "interrupted"]


@pytest.mark.usefixtures("no_plots")
def test_a_report_that_was_interrupted_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for module, name in ((plots, "all_plots"), (report, "runs_csv")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_report(study, tmp_path / "report")
    write_report(study, tmp_path / "report")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    "place",
    [
        lambda out: (out / "run.json").write_text("precious"),
        lambda out: (out / "thesis.tex").write_text("precious"),
        lambda out: (out / "report.md").write_text("precious"),
    ],
    ids=["a run", "other files", "another report.md"],
)
def test_a_report_replaces_nothing_but_reports(tmp_path: Path, place: Callable[[Path], int]) -> None:
    study = study_of(tmp_path / "runs", FakeRun("a", 1))
    out = tmp_path / "mine"
    (out / "plots").mkdir(parents=True)
    place(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(RunDirectoryError, match=r"choose (another|an empty)"):
        write_report(study, out)
    assert sorted(out.rglob("*")) == before
