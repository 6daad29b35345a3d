"""`compare` and `report` on the command line: one real run at the smallest size, and errors before anything starts."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fake_fit import run_fakes
from run_folders import FakeRun
from small import SMALL_RUN, Run, record

from pkm_lightning.compare import plots
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.schedule import ScheduledRun

SMALL = [o for o in SMALL_RUN if not o.startswith("~")]
SHORT = [*SMALL, "warm_up=false", "trainer.max_steps=4", "trainer.val_check_interval=4", "report.resamples=100"]


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "runs.csv").open(newline="") as file:
        return {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}


def test_a_comparison_is_reported_with_what_failed(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses stand-ins for the runs, then runs the command line of one of them for real and reports it."""
    commands: dict[str, list[str]] = {}

    def run(
        self: Processes, runs: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]
    ) -> Iterator[RunEnd]:
        commands.update({run.variant: self.command(run) for run in runs})
        yield from run_fakes(self, runs, tick)

    monkeypatch.setattr(Processes, "run", run)
    monkeypatch.setattr(plots, "all_plots", lambda study: ())
    (tmp_path / "fates.json").write_text(json.dumps({"runs/nan": "diverged"}))
    out = tmp_path / "out"
    command = ["ffn=memory_plus", "seeds=1", "out=out", "jobs=2", *SHORT, "+variants.nan={ffn: dense, optim.lr: 1}"]
    shown = cli("compare", *command)
    assert json.loads((out / "compare.json").read_text())["command"][4:] == command
    assert shown.code == 2
    assert "nan seed 1" in shown.err
    assert "diverged" in (out / "report.md").read_text()

    shutil.rmtree(out / "runs" / "memory_plus")
    assert cli(*commands["memory_plus"][3:]).code == 0
    metrics = record(out / "runs" / "memory_plus" / "seed-1")["metrics"]
    FakeRun("peer", 1).write(tmp_path / "there")
    outcome = cli("report", "runs=[out,there]", "out=merged", "report.resamples=100")
    assert outcome.code == 0, outcome.err
    reported = rows(tmp_path / "merged")
    assert {key: row["status"] for key, row in reported.items()} == {
        ("memory_plus", "1"): "finished",
        ("nan", "1"): "failed",
        ("peer", "1"): "finished",
    }
    assert float(reported["memory_plus", "1"]["recall_paraphrase"]) == metrics["test/recall_paraphrase"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare", "ffn=dense,mo", "out=out"], "variant mo: ffn=mo is not known; allowed: .*Did you mean 'moe'"),
        (["compare", "ffn=dense", "out=out", "optim.lr=-1"], "variant dense: optim.lr=-1"),
        (["compare", "out=out", "+variants.a={ffn: dense, callbacks.step_checkpoint.every_n_steps: 0}"],
         "variant a: .*every_n_steps=0 is out of range"),
        (["compare", "-m", "ffn=dense,moe", "out=out"], "-m sweeps fit only"),
        (["fit", "experiment=facts_ladder", "lr_sweep=null"], "lr_sweep is for compare, not for fit"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_starts(cli: Run, tmp_path: Path, command: list[str], message: str) -> None:
    outcome = cli(*command, "data.people=60", "data.cities=20", "data.vocab_size=600")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert re.search(message, outcome.err), outcome.err
    assert not (tmp_path / "out").exists()
