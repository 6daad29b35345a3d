"""`fit ffn=NAME` trains every plugin from its YAML on the facts, reports recall, and continues bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from processes import assert_equal_runs, metrics
from small import SMALL_RUN, Run
from tree import ffns_without_files

FFNS = ffns_without_files()


# Quick tests of the same for Memory+: a killed run in test_resume.py, a moved one in test_fit.py. Other FFNs differ in
# formulas, which tests/ffn compares, not in what a run does with them.
@pytest.mark.slow
@pytest.mark.parametrize("ffn", [*FFNS, "moe ffn.balancing=bias"])
def test_trains_reports_recall_and_resumes_bit_for_bit(cli: Run, ffn: str, tmp_path: Path) -> None:
    command = ["fit", *f"ffn={ffn}".split(), *SMALL_RUN, "+callbacks.interrupt._target_=toys.InterruptOnce"]
    whole = cli(*command, "run_dir=whole")
    assert whole.code == 0, whole.err
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["status"] == "finished"
    assert set(record["metrics"]["recall"]) >= {"seen", "paraphrase", "question", "control"}
    assert record["unknown_cost"] == []
    (tmp_path / "interrupt").touch()
    assert cli(*command, "run_dir=halves").code == 130
    assert json.loads((tmp_path / "halves" / "run.json").read_text())["status"] == "interrupted"
    (tmp_path / "halves").rename(tmp_path / "moved")
    again = cli(*command, "run_dir=moved")
    assert again.code == 0, again.err
    assert_equal_runs(tmp_path / "whole", tmp_path / "moved")
    assert not (tmp_path / "halves").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ffn", FFNS)
def test_ten_times_the_default_learning_rate_stays_finite(cli: Run, ffn: str, tmp_path: Path) -> None:
    """200 steps of the default run; the losses that it saw are in the results of the scripts."""
    options = ["optim.lr=0.06", "trainer.max_steps=200", "trainer.log_every_n_steps=10", "logger=none"]
    run = cli("fit", f"ffn={ffn}", *options, "~callbacks.progress_bar", "~callbacks.recall", "run_dir=hot")
    assert run.code == 0, run.err
    losses = [float(row["train/loss"]) for row in metrics(tmp_path / "hot") if row.get("train/loss")]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    print(ffn, losses[0], max(losses), losses[-1])


@pytest.mark.parametrize(("precision", "ffn"), [("bf16-true", "peer"), ("64-true", "memory_plus")])
def test_every_callback_works_in_weights_of_other_precision(cli: Run, precision: str, ffn: str, tmp_path: Path) -> None:
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
    chosen = [f"ffn={ffn}", f"trainer.precision={precision}", "callbacks=[default,slot_revival]"]
    run = cli("fit", *SMALL_RUN, *steps, *chosen, "run_dir=run")
    assert run.code == 0, run.err
    logged = {name: value for row in metrics(tmp_path / "run") for name, value in row.items() if value}
    assert {"val/loss", "val/recall_seen", "train/vitals/value_norm", "train/loss"} <= logged.keys()
    assert all(math.isfinite(float(value)) for value in logged.values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test/loss"] == pytest.approx(6.4, abs=1)
