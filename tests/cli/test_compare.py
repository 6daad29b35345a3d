"""`compare` and `report` as a user runs them: real runs at the smallest size, and errors before anything starts."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from run_folders import FakeRun, ladder
from small import SMALL_RUN, Run, record

SMALL = [o for o in SMALL_RUN if not o.startswith("~")]
SHORT = [*SMALL, "warm_up=false", "trainer.max_steps=4", "trainer.val_check_interval=2", "report.resamples=100"]


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "runs.csv").open(newline="") as file:
        return {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}


def test_a_comparison_runs_and_fails_in_part(cli: Run, tmp_path: Path) -> None:
    """One variant cannot learn: the other finishes, and the report sets_key why."""
    out = tmp_path / "out"
    command = ["ffn=memory_plus", "seeds=1", "out=out", "jobs=2", *SHORT,
               "+variants.nan={ffn: dense, optim.lr: 1e30, optim.clip_norm: null}"]  # fmt: skip
    shown = cli("compare", *command)
    assert json.loads((out / "compare.json").read_text())["command"][4:] == command
    assert shown.code == 2
    assert "nan seed 1" in shown.err
    found = rows(out)
    assert {key: row["status"] for key, row in found.items()} == {
        ("memory_plus", "1"): "finished",
        ("nan", "1"): "failed",
    }
    metrics = record(out / "runs/memory_plus/seed-1")["metrics"]
    assert float(found["memory_plus", "1"]["recall_paraphrase"]) == metrics["test/recall_paraphrase"]
    assert "diverged" in (out / "report.md").read_text()


def test_a_report_needs_nothing_but_run_directories(cli: Run, tmp_path: Path) -> None:
    for run in ladder((1,)):
        run.write(tmp_path / "here")
    FakeRun("peer", 1).write(tmp_path / "there")
    outcome = cli("report", "runs=[here,there]", "out=merged", "report.resamples=100")
    assert outcome.code == 0, outcome.err
    assert len(rows(tmp_path / "merged")) == 7
    assert {"report.html", "report.md", "runs.csv", "plots", "hparams"} <= {
        entry.name for entry in (tmp_path / "merged").iterdir()
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare", "out=out"], "nothing to compare; name FFNs"),
        (["compare", "ffn=dense,moe"], "out is not set"),
        (["compare", "ffn=dense,mo", "out=out"], "variant mo: ffn=mo is not known; allowed: .*Did you mean 'moe'"),
        (["compare", "ffn=dense,moe", "out=out", "seeds=0"], "seeds=0 is out of range"),
        (["compare", "ffn=dense,moe", "out=out", "budget.seconds=9", "jobs=2"], "set jobs=1"),
        (["compare", "ffn=dense,moe", "out=out", "seed=3"], "compare sets seed of each run itself; set seeds="),
        (["compare", "ffn=dense,moe", "out=out", "run_dir=x"], "compare sets run_dir of each run itself; set out="),
        (["compare", "ffn=dense,pkm", "out=out", "match=flops", "match_budget=1e3"],
         "variant dense: match=flops through ffn.hidden_dim: even its least value"),
        (["compare", "ffn=dense", "out=out", "optim.lr=-1"], "variant dense: optim.lr=-1"),
        (["compare", "ffn=dense", "out=out", "optim.lrr=1"], "optim.lrr is no key"),
        (["compare", "ffn=dense", "out=out", "optim.lr=0.1", "lr_sweep=[0.1,0.2]"], "both say the learning rate"),
        (["compare", "ffn=dense", "out=out", "+variants.dense={++optim.lr: 1}", "lr_sweep=[0.1,0.2]"],
         "variants.dense sets optim.lr"),
        (["compare", "ffn=dense", "out=out", "+variants.a={ffn.knn: 3}"], "variants.a names no FFN"),
        (["compare", "ffn=dense", "out=out", "+variants.a={ffn: dense, ffn.knn: 3}"], "variant a: ffn.knn is no key"),
        (["compare", "-m", "ffn=dense,moe", "out=out"], "-m sweeps fit only"),
        (["report", "out=out"], "runs is not set"),
        (["report", "runs=[nowhere]", "out=out"], "nowhere is no directory"),
        (["report", "runs=[.]", "out=out"], "holds no record of a run"),
        (["report", "runs=[.]"], "out is not set"),
        (["fit", "experiment=facts_ladder", "lr_sweep=null"], "lr_sweep is for compare, not for fit"),
        (["fit", "seeds=2"], "seeds is no key of the configuration"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_starts(cli: Run, tmp_path: Path, command: list[str], message: str) -> None:
    sizes = [] if command[0] == "report" else ["data.people=60", "data.cities=20", "data.vocab_size=600"]
    outcome = cli(*command, *sizes)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert re.search(message, outcome.err), outcome.err
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_else_is_refused(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    outcome = cli("compare", "ffn=dense", "out=out", *SHORT)
    assert "is not empty (thesis.tex) and no comparison" in outcome.err
