"""Runs of the command line as processes of their own, for what needs one: kills, signals, several ranks."""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from small import SMALL_RUN, Run

from pkm_lightning.checkpoints import SavedCheckpoint


def start(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts `python -m pkm_lightning ...` with its output in one pipe, by default in this environment."""
    command = [sys.executable, "-m", "pkm_lightning", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def fit(*overrides: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts `fit` on the small run."""
    return start("fit", *SMALL_RUN, *overrides, cwd=cwd)


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a process that must succeed; returns its output."""
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    return out


@contextlib.contextmanager
def held_elsewhere(run_dir: Path) -> Iterator[None]:
    """Starts another process that holds the lock of the directory within the block."""
    program = (
        "import fcntl, sys; file = open('.lock', 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=run_dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("")


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv without times and rates."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        timed = ("seconds", "train/throughput/")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in csv.DictReader(file)]


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """Returns the content of the latest checkpoint."""
    path = sorted((run_dir / "checkpoints").glob("*.ckpt"))[-1]
    return SavedCheckpoint(path).read()


def assert_equal_runs(first: Path, second: Path) -> None:
    """Weights, optimizer states and metrics of two finished runs agree bit for bit."""
    left, right = last_checkpoint(first), last_checkpoint(second)
    assert left["global_step"] == right["global_step"]
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, value in left["state_dict"].items():
        assert torch.equal(value, right["state_dict"][name]), name
    for ours, theirs in zip(left["optimizer_states"], right["optimizer_states"], strict=True):
        for key, state in ours["state"].items():
            assert state.keys() == theirs["state"][key].keys()
            for name, value in state.items():  # a table's count of updates is a number
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][key][name])), name
    assert metrics(first) == metrics(second)


def assert_continues_bit_for_bit(cli: Run, folder: Path, *command: str) -> None:
    """Fits once at a stretch and once with an interruption in the 7th step, in the working directory `folder`."""
    command = (*command, "+callbacks.interrupt._target_=toys.InterruptOnce")
    assert cli(*command, "run_dir=whole").code == 0
    (folder / "interrupt").touch()
    assert cli(*command, "run_dir=halves").code == 130
    again = cli(*command, "run_dir=halves")
    assert again.code == 0, again.err
    assert_equal_runs(folder / "whole", folder / "halves")
