"""Writes a model in memory as an exported folder, which `load` reads: for programs that train or change one."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch

import pkm_lightning
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER
from pkm_lightning.checkpoints.safetensors import FORMAT_VERSION, lay_out, with_sums
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.model import Transformer
from pkm_lightning.storage import write_beside, written_beside

WEIGHTS = "model.safetensors"


class HasModel(Protocol):
    """A `LoadedModel`, or a `LanguageModule` after `configure_model`."""

    @property
    def model(self) -> Transformer:
        """The transformer."""

    @property
    def config(self) -> dict[str, Any]:
        """Its resolved configuration."""


def save(holder: HasModel, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """Writes weights and tokenizer into `folder`, which is made, and returns the file of the weights.

    Args:
        holder: a `LoadedModel` or a `LanguageModule`.
        folder: `load(folder)` gives the model back, bit for bit. An earlier model in it is replaced.
        tokenizer: None for that of `holder`, or of the data module of its Trainer.

    Raises:
        CheckpointError: a table is split over ranks; the folder cannot be written.
        ConfigError: there is no tokenizer, or one that cannot be written.
    """
    folder = Path(folder)
    codec = tokenizer or getattr(holder, "tokenizer", None) or _of_trainer(holder)
    if not isinstance(codec, Tokenizer):
        raise ConfigError(
            f"save needs a tokenizer to write beside the weights, and {codec!r:.60} is none; pass tokenizer=."
        )
    if any(table.is_split for table in holder.model.value_tables):
        raise CheckpointError(
            "the model's table is split over ranks; save a checkpoint with the Trainer and export it."
        )
    state = {name: value.detach() for name, value in holder.model.state_dict().items()}
    texts = {
        "format": "pt",
        "pkm_lightning_format": FORMAT_VERSION,
        "pkm_lightning_version": pkm_lightning.__version__,
        "config": json.dumps(holder.config),
        "tokens_seen": str(int(getattr(holder, "tokens_seen", 0))),
        "tokenizer": codec.digest,
    }
    header, entries = lay_out({name: (tuple(value.shape), value.dtype) for name, value in state.items()}, texts)
    path = folder / WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            file.write(header)
            sums = []
            for name in entries:
                values = state[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(values)
                sums.append(zlib.crc32(values))
            file.seek(0)
            file.write(with_sums(header, sums))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); free the disk, or name another."
        ) from error
    write_beside(folder / TOKENIZER, codec.to_json())
    template = getattr(holder, "chat_template", None)
    if template is None:
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)  # of an earlier model
    else:
        write_beside(folder / CHAT_TEMPLATE, template)
    return path


def _of_trainer(holder: HasModel) -> object:
    trainer = getattr(holder, "_trainer", None)
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
