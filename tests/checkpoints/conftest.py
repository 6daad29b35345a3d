"""One checkpoint in every form on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_group import Groups
from sharded_folders import checkpoint, save_folders

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.export import write


@pytest.fixture(scope="session")
def checkpoints(ranks: Groups, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths by form: in one file, exported, and in folders that two ranks wrote, split by rows and by columns."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(checkpoint(), folder / "file.ckpt")
    write(SavedCheckpoint(folder / "file.ckpt"), folder / "model.safetensors")
    ranks(2).run(save_folders, folder)
    return {
        "file": folder / "file.ckpt",
        "exported": folder / "model.safetensors",
        "rows": folder / "0.ckpt",
        "columns": folder / "1.ckpt",
    }
