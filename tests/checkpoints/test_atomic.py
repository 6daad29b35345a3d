"""Single-file checkpoints appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_folders import checkpoint

from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
from pkm_lightning.checkpoints.sharded import save
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError, RunDirectoryError
from pkm_lightning.storage import write_beside


def test_a_file_replaces_a_folder_and_both_are_loaded(tmp_path: Path) -> None:
    path, plugin = tmp_path / "step.ckpt", AtomicCheckpointIO()
    save(*flatten(checkpoint()), path)
    (path.with_name("step.ckpt.old")).touch()  # a kill between two renames leaves one
    folder = plugin.load_checkpoint(path)
    plugin.save_checkpoint(folder, path)
    assert path.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.ckpt"]
    loaded = plugin.load_checkpoint(path)["state_dict"]
    assert all(torch.equal(loaded[name], value) for name, value in checkpoint()["state_dict"].items())
    loaded["model.norm.weight"].zero_()  # training updates what it loads


@pytest.mark.parametrize("has_previous", [True, False])
def test_a_failure_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_previous: bool
) -> None:
    path, plugin = tmp_path / "step.ckpt", AtomicCheckpointIO()
    if has_previous:
        plugin.save_checkpoint({"step": 1}, path)

    def full(_content: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    whole = ": the previous checkpoint is whole" if has_previous else ""
    reason = rf"cannot be written \(cut short: is the disk full\?\); free the disk or move run_dir{whole}\.$"
    with pytest.raises(CheckpointError, match=reason):
        plugin.save_checkpoint({"step": 2}, path)
    assert not has_previous or plugin.load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.ckpt"] * has_previous


def test_other_files_never_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunDirectoryError, match="mine cannot be written"):
        write_beside(tmp_path / "mine", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").is_dir()
