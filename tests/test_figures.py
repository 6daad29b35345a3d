"""Figures in prose are those of a committed result: `figures.csv` names its row, and `figures.py` compares."""

from __future__ import annotations

import csv
from pathlib import Path

import figures
import pytest
import report_tables
from tree import ROOT

#: Texts with figures that nothing committed holds. Only ever lower it: commit the result with the figure.
WITHOUT_RECORD = 18
HOW_TO = f"""
Each measured figure of README and docs/ has a row in tests/figures.csv: the page, the text around it with {{}} in its
place, a CSV under scripts/results/, and its row and column. A text without a measurement stands there as it is, with a
reason as its record: {", ".join(f"{reason!r} ({meaning})" for reason, meaning in figures.NOT_MEASURED.items())}.
`python tests/figures.py --write` puts new values into the pages. Its docstring explains the columns."""


def test_every_figure_is_that_of_its_record() -> None:
    wrong = figures.problems(ROOT, figures.FILE, figures.PAGES)
    assert not wrong, "\n".join([*wrong, HOW_TO])


def test_fewer_and_fewer_figures_are_without_a_record() -> None:
    texts = [passage.text for passage in figures.passages(figures.FILE) if passage.record == "no record"]
    assert len(texts) == WITHOUT_RECORD, f"more than before, or fewer: then lower WITHOUT_RECORD. {texts}"


def test_summaries_have_the_tables_of_their_reports() -> None:
    summaries = sorted((ROOT / "scripts" / "results").glob("*/summary.csv"))
    assert summaries
    for file in summaries:
        report = (file.parent / "report.md").read_text(encoding="utf-8")
        stale = f"python tests/report_tables.py {file.parent.relative_to(ROOT)}"
        assert file.read_text(encoding="utf-8") == report_tables.summary(report), stale


def test_cells_of_a_report() -> None:
    report = """## Recall
| variant | mean | 95% interval | less | lr |
|---|---:|---:|---|---|
| moe | 3.81x | 3.17x to >= 4.00x | +17.6 pp (-1.5 pp to +19.6 pp) | 1,024 |

| key | values |
|---|---|
| seed | 1 |
"""
    assert report_tables.cells(report) == [
        ["Recall", "moe", "mean", "3.81", "3.17", ">=4.00"],
        ["Recall", "moe", "less", "17.6", "-1.5", "19.6"],
        ["Recall", "moe", "lr", "1024", "", ""],
    ]


RECORD = "variant,seed,recall,seconds,limit\nmoe,1,0.7,90,>=4.02\nmoe,2,0.8,30,\ndense,1,0.4,50,\ndense,2,0.4,10,\n"
PAGE = """
MoE recalls 75.0% (up to
80%), 35 points more than dense, takes 2.00 times as long, per seed 1.8 to 3.0, and wins at least 4.0x.
It trains for one minute. Torch 2.13.0 needs 64 MiB. `9.5%` of 2^20.5.
| a | 1.25 / 0 |
"""
ENTRIES = (
    ("{}% (up to {}%)", "variant=moe", "recall", "mean", "", "100"),
    ("", "", "", "max", "", "100"),
    ("{} points", "", "", "mean", "- variant=dense", "100"),
    ("takes {} times", "", "seconds", "mean", "/ variant=dense", ""),
    ("{} to {},", "", "", "min", "each / variant=dense", ""),
    ("", "", "", "max", "each / variant=dense", ""),
    ("for {} minute", "", "", "mean", "", "1/60"),
    ("wins {}x", "variant!=dense;seed=1", "limit", "", "", ""),
    ("| {} / {} |", "variant=dense;seed=1", "seconds", "", "/ recall", "0.01"),
    ("", "variant=dense", "recall", "spread", "", ""),
)


def problems(folder: Path, page: str, *, write: bool = False) -> list[str]:
    results = folder / "scripts" / "results"
    results.mkdir(parents=True)
    (results / "runs.csv").write_text(RECORD)
    (folder / "page.md").write_text(page)
    with (folder / "figures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["page", "text", "record", "rows", "column", "how", "against", "factor"])
        writer.writerows(["page.md", text, "runs.csv", *source] for text, *source in ENTRIES)
        writer.writerow(["", "needs 64 MiB", "setting", *[""] * 5])
    return figures.problems(folder, folder / "figures.csv", ["page.md"], write=write)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("75.0%", "75.1%", "75.1 in"),
        ("80%", "79%", "79 in"),
        ("35 points", "34 points", "34 in"),
        ("2.00 times", "2.01 times", "2.01 in"),
        ("3.0, and", "2.9, and", "2.9 in"),
        ("at least 4.0x", "4.0x", "4.0 in"),
        ("one minute", "two minutes", "two in"),
        ("/ 0", "/ 3", "3 in"),
        ("64 MiB", "65 MiB", "'65 MiB' stands in no text"),
        ("It trains", "It is 3 GB larger. It trains", "'3 GB' stands in no text"),
        ("It trains", "It wins 4.0x. It trains", "2 places"),
        ("| a |", "| 0.93 |", "'0.93' stands in no text"),
        ("| a |", "| 13, 17 |", "'13, 17' stands in no text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert any(named in problem for problem in problems(tmp_path, PAGE.replace(old, new)))


def test_a_page_that_is_right_and_one_that_is_corrected(tmp_path: Path) -> None:
    assert problems(tmp_path / "right", PAGE) == []
    off = PAGE.replace("75.0%", "5.0%").replace("at least 4.0x", "4.1x").replace("2.00", "2.50")
    assert len(problems(tmp_path / "wrong", off, write=True)) == 3
    assert (tmp_path / "wrong" / "page.md").read_text() == PAGE.replace("at least 4.0x", ">= 4.0x")


def test_an_entry_of_several_rows_says_how_they_are_one_value(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(RECORD)
    source = figures.Source("runs.csv", "variant=moe", "recall", how="", against="", factor="")
    with pytest.raises(figures.FigureError, match="has 2 values, and `how` is empty"):
        figures.value_of(source, tmp_path)
