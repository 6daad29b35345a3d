"""Lightning's plugin for single-file checkpoints: a kill or a full disk leaves the previous checkpoint whole.

Lightning's own plugin writes through a file in the system's temporary folder. Where that is another file system, the
file is copied to its place, and a kill can cut the copy short.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from pkm_lightning.checkpoints.folder import write_error
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import written_beside


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints on a local file system; folders of several ranks are read as well."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes `checkpoint` to `path`, which appears when all of it is on disk.

        Raises:
            CheckpointWriteError: the disk is full or the folder cannot be written; an earlier file at `path` is whole.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(path, over_folder=True) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # On a full disk torch's writer raises a RuntimeError about positions in the archive, without the cause.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "cut short: is the disk full?"
            raise write_error(path, reason) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Returns the content of a file, or of a folder that several ranks wrote; runs nothing that a file names.

        Raises:
            CheckpointError: it is damaged, or an exported model.
        """
        saved = SavedCheckpoint(path)
        saved.check_sums()
        if saved.kind == "folder":
            return saved.read()
        if saved.kind == "exported":
            raise CheckpointError(f"ckpt={path} is an exported model: training continues from a run's checkpoint only.")
        # Not mapped read-only: optimizers keep the tensors that they load, and update them in place.
        return super().load_checkpoint(path, *arguments, **{**named, "weights_only": True})
