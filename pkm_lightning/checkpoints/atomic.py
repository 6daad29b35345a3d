"""Checkpoints written beside and renamed: a kill or a full disk leaves the previous one whole.

Lightning's own writer goes through a file in the system's temporary folder; moved to another file system, that is a
plain copy, which a kill can cut short.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from pkm_lightning.checkpoints.sharded import SavedTensors, replace
from pkm_lightning.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints on a local file system; folders are read as well."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes `checkpoint` to `path`, on disk before the name appears.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; nothing is left half-written.
        """
        path = Path(path)
        beside = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace(beside, path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            # Of a full disk torch's own writer says no more than that the positions do not add up.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "cut short: is the disk full?"
            raise CheckpointError(
                f"{path} cannot be written ({reason}); free the disk or move run_dir: the previous checkpoint is whole."
            ) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        """The content of a file, or of a folder that several ranks have written.

        Raises:
            CheckpointError: a folder that is damaged.
        """
        if Path(path).is_dir():
            return SavedTensors(path).read_whole()
        return super().load_checkpoint(path, *arguments, **named)
