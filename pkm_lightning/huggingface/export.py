"""Writes a folder that transformers loads; `pkm_lightning.huggingface.architecture` chooses the class.

Needs no transformers: safetensors, JSON and Markdown, and the model is never in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.build.loading import context_of, saved_tokenizer
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER, find_companion, run_folder
from pkm_lightning.checkpoints.export import weight_shapes, write_tensors
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.huggingface.architecture import describe
from pkm_lightning.huggingface.model_card import model_card
from pkm_lightning.huggingface.tokenizer import write_tokenizer
from pkm_lightning.storage import folder_written_beside

#: What a folder holds, and may be replaced.
FILES = frozenset(
    (
        *("model.safetensors", "config.json", "generation_config.json", "README.md"),
        *("tokenizer_config.json", TOKENIZER, CHAT_TEMPLATE),
    )
)


@dataclass(frozen=True)
class WrittenFolder:
    """What was written.

    Attributes:
        kind: name of the class that loads it.
        n_tensors, n_bytes: of the weights.
        has_tokenizer: whether the training's tokenizer was found.
    """

    kind: str
    n_tensors: int
    n_bytes: int
    has_tokenizer: bool


def check_replaceable(folder: Path) -> None:
    """Refuses a folder with anything that an export does not write, since replacing it would delete that.

    Raises:
        ConfigError: naming the first such entry.
    """
    foreign = sorted(e.name for e in folder.iterdir() if e.name not in FILES or e.is_dir()) if folder.exists() else []
    if foreign:
        raise ConfigError(
            f"dir={folder} holds {foreign[0]}, which no export has written; move it, or choose another name."
        )


def write_folder(checkpoint: SavedCheckpoint, folder: Path, quantize: str | None = None) -> WrittenFolder:
    """Writes `folder`, which appears or is replaced when it is complete.

    Args:
        checkpoint: of any kind.
        folder: to write.
        quantize: `int8`, `int4` or `int2`, of the value tables; None keeps them as they are.

    Raises:
        CheckpointError: weights that do not fit their configuration, another model's tokenizer, a full disk.
    """
    content = checkpoint if quantize is None else QuantizedCheckpoint(checkpoint, quantize)
    architecture = describe(checkpoint, content)
    tokenizer = saved_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer = tokenizer.without_additions()
    context = context_of(checkpoint.config)
    ids = _token_ids(architecture.config, tokenizer)
    try:
        with folder_written_beside(folder) as beside:
            digest = None if tokenizer is None else tokenizer.digest
            entries = write_tensors(content, beside / "model.safetensors", architecture.names, digest)
            described = _described(architecture.config, ids, _dtype(checkpoint))
            _write_json(beside / "config.json", described)
            _write_json(beside / "generation_config.json", ids)
            if tokenizer is not None:
                write_tokenizer(tokenizer, beside, context, find_companion(checkpoint.path, CHAT_TEMPLATE))
            card = model_card(checkpoint, run_folder(checkpoint.path), needs_package=architecture.needs_package)
            (beside / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"dir={folder} cannot be written ({error.strerror}); free the disk or choose another place."
        ) from error
    size = sum(entry.n_bytes for entry in entries.values())
    return WrittenFolder(architecture.loaded_by, len(entries), size, tokenizer is not None)


def _token_ids(config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the ids of the control tokens: those of a pretrained model, else the tokenizer's; null where none are."""
    own = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: own.get(name) if config.get(name) is None else config[name] for name in names}


def _described(config: dict[str, Any], ids: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the content of config.json. Control tokens stand there as null too, or Llama's own defaults would hold.

    In config.json a padding token is one whose embedding Llama takes from training, which the end token needs.
    """
    pad = None if ids["pad_token_id"] == ids["eos_token_id"] else ids["pad_token_id"]
    return {**config, **ids, "pad_token_id": config.get("pad_token_id", pad), "dtype": dtype}


def _dtype(checkpoint: SavedCheckpoint) -> str:
    """Returns the dtype of the weights: not that of scales, which quantised tables have as well."""
    dtypes = {name: dtype for name, (_, dtype) in weight_shapes(checkpoint).items() if dtype.is_floating_point}
    return str(dtypes.get("embedding.weight", next(iter(dtypes.values())))).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
