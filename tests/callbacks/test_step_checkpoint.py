"""What the folder of checkpoints holds after a save: the newest whole one, and what is still being written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.callbacks import StepCheckpoint
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
