"""A rank is killed or fails: the others end, one sentence reports it, and the same command continues the run."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import psutil
import pytest
from launches import DDP, end, srun
from processes import finish, fit, last_checkpoint, metrics
from small import SMALL_RUN

from pkm_lightning.errors import CheckpointError, RankLostError
from pkm_lightning.supervision.rank_failures import name_lost_rank

FAILS = """
import lightning as L
from pkm_lightning.errors import DataError

class Fails(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 3:
            raise {error}
"""


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns rank 0 and the ranks that it started."""
    first = psutil.Process(process.pid)
    others = [child for child in first.children() if "train_ddp_process" in " ".join(child.cmdline())]
    return [first, *others]


def has_ended(rank: psutil.Process) -> bool:
    try:
        # Without an init process, a child of a killed process stays a zombie.
        return rank.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(process: subprocess.Popen[str], run: Path, rank: int, rows: int, delay: float = 0.0) -> list[psutil.Process]:
    """Sends SIGKILL to a rank `delay` seconds after metrics.csv has `rows` rows; returns all ranks."""
    while process.poll() is None and not ((run / "metrics.csv").exists() and len(metrics(run)) >= rows):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before the kill"
    time.sleep(delay)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[rank].send_signal(signal.SIGKILL)
    return ranks


def ended(process: subprocess.Popen[str], ranks: list[psutil.Process]) -> tuple[str, float]:
    """Waits for all ranks, also for those that outlive rank 0; returns their output and the seconds until the end."""
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    while not all(map(has_ended, ranks)):
        assert time.monotonic() - began < 60, "a rank was left behind"
        time.sleep(0.05)
    return out, time.monotonic() - began


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def trainer_of(ranks: int) -> L.Trainer:
    return cast(L.Trainer, SimpleNamespace(world_size=ranks, global_rank=2, strategy=SimpleNamespace(launcher=None)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:4711. "
            "This is typically caused by a remote worker crashing.",
            "Connection closed by peer [10.0.0.3]:4711",
        ),
        ("Gloo error: Timed out waiting 1800000ms for recv operation to complete", None),
        (
            "NCCL error in: /pytorch/x.cpp:1, remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error",
            None,
        ),
    ],
)
def test_a_broken_connection_is_a_lost_rank(text: str, reason: str | None) -> None:
    with (
        pytest.raises(RankLostError, match="rank 2 lost the connection to another rank") as raised,
        name_lost_rank(trainer_of(4)),
    ):
        raise RuntimeError(text)
    assert reason is None or f"({reason})" in str(raised.value)
    with pytest.raises(RuntimeError, match=re.escape(text)), name_lost_rank(trainer_of(1)):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory."), CheckpointError("cut short: timed out waiting")]
)
def test_other_errors_stay_what_they_are(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as raised, name_lost_rank(trainer_of(4)):
        raise error
    assert raised.value is error


def test_a_killed_rank_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ["trainer.max_steps=2000", "trainer.log_every_n_steps=1", "trainer.val_check_interval=2000"]
    process = fit(*DDP, *steps, "ffn=dense", "run_dir=run", cwd=tmp_path)  # starts faster than one with kernels
    out, seconds = ended(process, kill(process, run, rank=1, rows=6))
    assert process.returncode == 75, out
    assert "Traceback" not in out
    checkpoint = sorted((run / "checkpoints").iterdir())[-1].name
    assert (
        f"rank 1 was killed by SIGKILL; the last checkpoint, {checkpoint}, is whole: the same command with "
        f"run_dir={run} continues from it" in out.splitlines()
    )
    assert seconds < 60  # usually 2; the grace of a hanging main thread is 10, and the machine may be busy
    assert record(run)["status"] == "interrupted"
    assert record(run)["tokens"] > 0
    assert record(run)["seconds"]["processor"] is None  # that of one rank alone would be too little
    assert last_checkpoint(run)["global_step"] >= 4


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param('DataError("shard 7 is missing; copy it to this node.")', 2, marks=pytest.mark.slow),
        pytest.param('ValueError("a mistake")', 1, marks=pytest.mark.slow),
    ],
)
def test_the_error_of_one_rank_reaches_the_user(tmp_path: Path, error: str, code: int) -> None:
    (tmp_path / "mine.py").write_text(FAILS.format(error=error))
    process = fit(*DDP, "+callbacks.fails._target_=mine.Fails", "run_dir=run", cwd=tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    text = error.split('"')[1]
    assert f"rank 1 failed: {error.split('(')[0]}: {text}" in out
    # An error in a program is shown with its traceback, as in a run of one process.
    assert ("Traceback" in out) == (code == 1)
    assert record(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_an_externally_started_rank_is_lost(tmp_path: Path, lost: int) -> None:
    run = tmp_path / "run"
    tasks = srun(*SMALL_RUN, *DDP, "trainer.max_steps=2000", "run_dir=run", cwd=tmp_path)
    while not ((run / "metrics.csv").exists() and len(metrics(run)) >= 5):
        assert all(task.poll() is None for task in tasks)
        time.sleep(0.02)
    tasks[lost].kill()
    code, out = end(tasks)[1 - lost]
    assert code == 75, out
    assert "Traceback" not in out
    assert f"rank {1 - lost} lost the connection to another rank (" in out
    assert "continues from it" in out
    # A killed rank 0 leaves "running", which is resumed as well, since nothing holds the lock.
    assert record(run)["status"] == ("interrupted" if lost else "running")


@pytest.mark.slow
def test_twenty_kills_of_random_ranks_at_random_steps(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    options = [
        *DDP,
        "trainer.max_steps=60",
        "trainer.val_check_interval=10",
        "callbacks.step_checkpoint.every_n_steps=2",
        "trainer.log_every_n_steps=1",
    ]
    finish(fit(*options, "run_dir=whole", cwd=tmp_path))
    whole, dice, slowest = metrics(tmp_path / "whole"), random.Random(0), 0.0
    for number in range(20):
        lost, rows, run = dice.randrange(2), dice.randrange(1, 50), tmp_path / f"run-{number}"
        process = fit(*options, f"run_dir={run}", cwd=tmp_path)
        out, seconds = ended(process, kill(process, run, lost, rows, delay=dice.random() * 0.05))
        slowest = max(slowest, seconds)
        case = f"rank {lost} after {rows} rows\n{out}"
        assert process.returncode == (75 if lost else -signal.SIGKILL), case
        assert out.count(f"rank {lost} was killed") == 1, case
        assert "Traceback" not in out, case
        if "no checkpoint was written yet" not in out:
            assert last_checkpoint(run)["global_step"] % 2 == 0, case
        assert record(run)["status"] == ("interrupted" if lost else "running"), case
        finish(fit(*options, f"run_dir={run}", cwd=tmp_path))
        assert metrics(run) == whole, case
    record_property("slowest_end_seconds", round(slowest, 1))
    print(f"slowest end after a kill: {slowest:.1f} s")
