"""Files and folders of weights: written atomically, sharded over ranks, exported, mapped into memory; one reader."""

from pkm_lightning.checkpoints.reader import (
    DerivedTensor,
    SavedCheckpoint,
    later_buffers,
    latest_checkpoint,
    open_checkpoint,
)

__all__ = ["DerivedTensor", "SavedCheckpoint", "later_buffers", "latest_checkpoint", "open_checkpoint"]
