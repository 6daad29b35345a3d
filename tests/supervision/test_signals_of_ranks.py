"""Signals to real processes: whichever rank and phase they reach, the exit code names them and nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import finish, fit, last_checkpoint, metrics, start

TWO_RANKS = ["strategy=ddp", "devices=2"]
#: Answers to all of these questions take seconds.
LONG_TEST = ["data.people=400", "data.eval_facts=1000", "callbacks.recall.test_items=5000"]


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


def in_training(run: Path) -> bool:
    return (run / "metrics.csv").exists() and len(metrics(run)) >= 2


def in_test(run: Path) -> bool:
    return (run / "usage.json").exists()  # written at the end of training


def send(process: subprocess.Popen[str], run: Path, due: Callable[[Path], bool], number: int, rank: int) -> None:
    """Sends a signal to a rank as soon as `due`."""
    while process.poll() is None and not due(run):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before the signal"
    ranks = [psutil.Process(process.pid)]
    ranks += [child for child in ranks[0].children() if "train_ddp_process" in " ".join(child.cmdline())]
    ranks[rank].send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("due", [in_training, in_test])
@pytest.mark.parametrize(("rank", "devices"), [(0, []), (1, TWO_RANKS)])
def test_a_signal_gives_its_code_and_the_run_continues(
    tmp_path: Path, number: signal.Signals, due: Callable[[Path], bool], rank: int, devices: list[str]
) -> None:
    run = tmp_path / "run"
    steps = "trainer.max_steps=2000" if due is in_training else "trainer.max_steps=12"
    process = fit(*LONG_TEST, steps, *devices, "run_dir=run", cwd=tmp_path)
    send(process, run, due, number, rank)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 128 + number, out
    assert "Traceback" not in out
    assert "continues" in out
    assert status(run) == "interrupted"
    assert last_checkpoint(run)["global_step"] >= int(metrics(run)[-1]["step"])


@pytest.mark.slow
def test_a_run_of_several_ranks_is_read_by_its_checkpoint_alone(tmp_path: Path) -> None:
    finish(fit(*TWO_RANKS, "trainer.max_steps=4", "run_dir=run", cwd=tmp_path))
    checkpoint = "ckpt=run/checkpoints/step-00000004.ckpt"
    assert (tmp_path / checkpoint.removeprefix("ckpt=")).is_dir()
    finish(start("test", checkpoint, cwd=tmp_path))
    finish(start("validate", checkpoint, cwd=tmp_path))
    finish(start("predict", checkpoint, "data.prompts=[a,b,c]", "out=answers.jsonl", cwd=tmp_path))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["a", "b", "c"]
    finish(start("export", checkpoint, "file=model.safetensors", cwd=tmp_path))
    assert not (tmp_path / "runs").exists()
