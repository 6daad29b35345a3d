"""What the folder of checkpoints holds after a save: the newest whole one, and what is still being written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pkm_lightning.callbacks import RunInterrupted, StepCheckpoint
from pkm_lightning.errors import ConfigError


def test_older_and_half_written_ones_go_and_later_ones_stay(tmp_path: Path) -> None:
    for name in ("step-00000004.ckpt", "step-00000006.ckpt.tmp", "step-00000012.ckpt.tmp"):
        (tmp_path / name).mkdir()
    for name in ("step-00000008.ckpt", "step-00000002.ckpt.tmp", "notes.txt"):
        (tmp_path / name).touch()
    callback = StepCheckpoint(dirpath=str(tmp_path), every_n_steps=4)
    first: Any = SimpleNamespace(is_global_zero=True)
    other: Any = SimpleNamespace(is_global_zero=False)
    callback._remove_older(other)
    assert len(list(tmp_path.iterdir())) == 6
    callback._remove_older(first)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "notes.txt", "step-00000008.ckpt", "step-00000012.ckpt.tmp",
    ]  # fmt: skip


def test_a_word_for_the_background_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step_checkpoint.asynchronous='maybe'"):
        StepCheckpoint(dirpath=str(tmp_path), every_n_steps=4, asynchronous="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("arrives", ["never", "before the votes", "during the votes"])
def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path, arrives: str) -> None:
    callback = StepCheckpoint(dirpath=str(tmp_path), every_n_steps=4)

    def reduce(votes: torch.Tensor, reduce_op: str) -> torch.Tensor:
        if arrives == "during the votes":
            callback.request_stop("SIGTERM")
        return votes

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    if arrives == "never":
        callback.stop_if_requested(trainer)
        return
    if arrives == "before the votes":
        callback.request_stop("SIGTERM")
    with pytest.raises(RunInterrupted if arrives == "before the votes" else KeyboardInterrupt, match="SIGTERM"):
        callback.stop_if_requested(trainer)
