"""The read background in a file, or in the checkpoint of a run, counted in its training or taken over in finetuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.adaptation.background import ReadBackground
from pkm_lightning.build.loading import find_weights
from pkm_lightning.checkpoints import SavedCheckpoint, open_checkpoint
from pkm_lightning.errors import CheckpointError

#: Callbacks whose state has an entry `background`; that of a finetuned run goes before.
_KEEPERS = ("SparseRows", "ReadBackgroundCounter")


def has_background(run: str | Path) -> bool:
    """Returns whether the checkpoint of a run (or a checkpoint) holds a background; an exported model has none.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return _keeper(open_checkpoint(find_weights(Path(run), "init_from="))) is not None


def saved_background(run: str | Path, key: str = "init_from=") -> ReadBackground:
    """Returns the background in the checkpoint of a run; `key` stands before its path in messages.

    Raises:
        CheckpointError: there is no checkpoint, or it holds none.
    """
    checkpoint = open_checkpoint(find_weights(Path(run), key))
    keeper = _keeper(checkpoint)
    if keeper is None:
        raise CheckpointError(
            f"{key}{run} holds no read background; count one in a text with finetune.background_path=TEXT."
        )
    others = [key for key in checkpoint.skeleton if key != "callbacks"]
    state = checkpoint.map(without=others)["callbacks"][keeper]["background"]
    # Copies: the tensors of a file stay in it.
    return ReadBackground.from_state(_copied(state))


def named_background(path: str | Path, key: str) -> ReadBackground:
    """Returns the background of a run, or of a file that `ReadBackground.save` wrote.

    Raises:
        CheckpointError: as `saved_background` and `ReadBackground.load`.
    """
    return saved_background(path, key) if Path(path).is_dir() else ReadBackground.load(path, key)


def _keeper(checkpoint: SavedCheckpoint) -> str | None:
    states = checkpoint.skeleton.get("callbacks") or {}
    backgrounds = {name: (states.get(name) or {}).get("background") or {} for name in _KEEPERS}
    return next((name for name, background in backgrounds.items() if background.get("n_batches")), None)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
