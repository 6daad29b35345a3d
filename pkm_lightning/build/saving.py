"""Writes a model in memory as an exported folder, which `load` reads: for programs that train or change one."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import pkm_lightning
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER
from pkm_lightning.checkpoints.safetensors import FORMAT_VERSION, lay_out, with_sums
from pkm_lightning.data.base import data_of, tokenizer_of
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
        CheckpointError: a table is split over ranks; the folder holds something else, or cannot be written.
        ConfigError: there is no model, or no tokenizer of its ids that can be written.

    Example: `docs/trained-models.md`, "From a program".
    """
    folder = Path(folder)
    if not isinstance(getattr(holder, "model", None), nn.Module):
        raise ConfigError(
            f"save needs what load returned, or a LanguageModule after configure_model, and not {holder!r:.60}."
        )
    _check_replaceable(folder)
    codec = tokenizer or getattr(holder, "tokenizer", None) or _of_trainer(holder)
    if not isinstance(codec, Tokenizer):
        raise ConfigError(
            f"save needs a tokenizer to write beside the weights, and {codec!r:.60} is none; pass tokenizer=."
        )
    if codec.vocab_size > int(holder.config["model"]["vocab_size"]):
        raise ConfigError(
            f"the tokenizer has {codec.vocab_size} ids and the model {holder.config['model']['vocab_size']}; pass the "
            "one that it was trained with as tokenizer=."
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


def _check_replaceable(folder: Path) -> None:
    """Refuses a folder whose tokenizer belongs to a run or to other weights.

    Raises:
        CheckpointError: naming what lies there.
    """
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name != WEIGHTS)
    if (folder / "config.yaml").exists():
        others.append("config.yaml of a run")
    if others:
        raise CheckpointError(f"{folder} holds {others[0]}, whose {TOKENIZER} would be replaced; name another folder.")


def _of_trainer(holder: HasModel) -> object:
    return tokenizer_of(data_of(getattr(holder, "_trainer", None)))
