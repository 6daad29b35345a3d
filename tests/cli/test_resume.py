"""A run killed at any step and started again ends bit for bit like one that nobody touched."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import assert_equal_runs, finish, fit, last_checkpoint, metrics
from small import SMALL_RUN, Run

#: In place of those of the small run; Hydra takes the last of several. Answers would take most of the time.
STEPS = ["trainer.max_steps=16", "callbacks.recall.val_items=0", "callbacks.recall.test_items=0"]


def kill_after(process: subprocess.Popen[str], run_dir: Path, rows: int, delay: float) -> None:
    """SIGKILL `delay` seconds after metrics.csv has `rows` rows; a run that ends before is left to end."""
    while process.poll() is None:
        if (run_dir / "metrics.csv").exists() and len(metrics(run_dir)) >= rows:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait(timeout=180)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_untouched_one(cli: Run, tmp_path: Path, workers: int) -> None:
    options = [*STEPS, f"data.num_workers={workers}"]
    whole = cli("fit", *SMALL_RUN, *options, "run_dir=whole")
    assert whole.code == 0, whole.err
    kill_after(fit(*options, "run_dir=killed", cwd=tmp_path), tmp_path / "killed", rows=4, delay=0.02)
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert record["status"] == "running", "the kill came too late to test anything"
    assert last_checkpoint(tmp_path / "killed")["global_step"] < 16
    resumed = cli("fit", *SMALL_RUN, *options, "run_dir=killed")
    assert resumed.code == 0, resumed.err
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "usage.json").read_text() == (tmp_path / "killed" / "usage.json").read_text()


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    finish(fit(*STEPS, "run_dir=whole", cwd=tmp_path))
    kill_after(fit(*STEPS, "run_dir=killed", cwd=tmp_path), tmp_path / "killed", rows=1, delay=0.0)
    finish(fit(*STEPS, "run_dir=killed", cwd=tmp_path))
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ten_kills_at_random_moments(tmp_path: Path, accumulate: int) -> None:
    options = [
        "trainer.max_steps=60",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.val_check_interval={5 * accumulate}",
        "callbacks.step_checkpoint.every_n_steps=3",
        "trainer.log_every_n_steps=1",
    ]
    finish(fit(*options, "run_dir=whole", cwd=tmp_path))
    dice = random.Random(accumulate)
    for _ in range(10):
        rows = dice.randrange(0, 66)
        kill_after(fit(*options, "run_dir=killed", cwd=tmp_path), tmp_path / "killed", rows, dice.random() * 0.1)
        if json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "finished":
            break
    else:
        finish(fit(*options, "run_dir=killed", cwd=tmp_path))
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_an_honest_record(tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    process = fit("trainer.max_steps=2000", "run_dir=run", cwd=tmp_path)
    while process.poll() is None and not ((run / "metrics.csv").exists() and len(metrics(run)) >= 2):
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    assert "Traceback" not in out
    assert "continues" in out
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert last_checkpoint(run)["global_step"] >= int(metrics(run)[-1]["step"])


@pytest.mark.slow
def test_ctrl_c_without_checkpoints_is_an_interruption_too(tmp_path: Path) -> None:
    process = fit("trainer.max_steps=5000", "~callbacks.step_checkpoint", "run_dir=run", cwd=tmp_path)
    file = tmp_path / "run" / "metrics.csv"
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["tokens"] > 0
