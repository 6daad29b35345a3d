"""Writes a folder that transformers loads: a dense model as plain Llama, any other as the class of this package.

Needs no transformers: safetensors, JSON and Markdown, and the model is never in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.build.loading import context_of, saved_tokenizer
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER, find_companion, run_folder
from pkm_lightning.checkpoints.export import weight_shapes, write_tensors
from pkm_lightning.checkpoints.reader import SavedCheckpoint, later_buffers
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.huggingface.folder_keys import CLASS, GROUPS, MODEL_TYPE
from pkm_lightning.huggingface.llama import is_llama, llama_config, llama_names
from pkm_lightning.huggingface.model_card import model_card
from pkm_lightning.huggingface.tokenizer import write_tokenizer
from pkm_lightning.model import Transformer
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


def write_folder(checkpoint: SavedCheckpoint, folder: Path) -> WrittenFolder:
    """Writes `folder`, which appears or is replaced when it is complete.

    Raises:
        CheckpointError: weights that do not fit their configuration, another model's tokenizer, a full disk.
    """
    config = checkpoint.config
    model = _shapes(checkpoint)
    dense = model if model is not None and is_llama(model) else None
    tokenizer = saved_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer = tokenizer.without_additions()
    context = context_of(config)
    architecture = _class_config(config) if dense is None else llama_config(dense)
    described = {**architecture, "max_position_embeddings": context, **_token_ids(tokenizer, in_config=True)}
    dtypes = (dtype for _, dtype in weight_shapes(checkpoint).values() if dtype.is_floating_point)
    described["dtype"] = str(next(dtypes)).removeprefix("torch.")
    if dense is not None and context is None:
        del described["max_position_embeddings"]
    try:
        with folder_written_beside(folder) as beside:
            names = None if dense is None else llama_names(dense)
            digest = None if tokenizer is None else tokenizer.digest
            entries = write_tensors(checkpoint, beside / "model.safetensors", names, digest)
            _write_json(beside / "config.json", described)
            _write_json(beside / "generation_config.json", _token_ids(tokenizer, in_config=False))
            if tokenizer is not None:
                write_tokenizer(tokenizer, beside, context, find_companion(checkpoint.path, CHAT_TEMPLATE))
            card = model_card(checkpoint, run_folder(checkpoint.path), is_llama=dense is not None)
            (beside / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"dir={folder} cannot be written ({error.strerror}); free the disk or choose another place."
        ) from error
    size = sum(entry.n_bytes for entry in entries.values())
    return WrittenFolder(architecture["architectures"][0], len(entries), size, tokenizer is not None)


def _shapes(checkpoint: SavedCheckpoint) -> Transformer | None:
    """Returns the model without memory, whose weights the checkpoint holds; None if it has classes of the user's own.

    These are constructed when the folder is loaded by someone who trusts it.

    Raises:
        CheckpointError: weights that do not fit the configuration, or one without what decides the model.
    """
    config = checkpoint.config
    absent = [group for group in GROUPS if not isinstance(config.get(group), dict)]
    absent += [] if absent or "base_ffn" in config["model"] else ["model.base_ffn"]
    if absent:
        raise CheckpointError(
            f"ckpt={checkpoint.path} was trained with a configuration without {absent[0]}; format=hf exports the "
            "transformers of this package."
        )
    try:
        check_trusted({group: config[group] for group in GROUPS}, str(checkpoint.path))
    except ConfigError:
        return None
    model = build_meta_model(config)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint.check_weights(shapes, later_buffers(model, "model."))
    return model


def _class_config(config: dict[str, Any]) -> dict[str, Any]:
    groups = {group: config[group] for group in GROUPS}
    # Of the machine and the training: in transformers its own optimizer learns the table, on the model's device.
    groups["model"] = {**groups["model"], "compile": False, "activation_checkpointing": False}
    groups["table"] = {**groups["table"], "device": "auto", "learning": "dense"}
    return {"model_type": MODEL_TYPE, "architectures": [CLASS], "transformer": groups}


def _token_ids(tokenizer: Tokenizer | None, *, in_config: bool) -> dict[str, int | None]:
    """Returns the ids of the control tokens: null where there are none, or Llama's own defaults would hold."""
    eos, pad = (None, None) if tokenizer is None else (tokenizer.eos_id, tokenizer.pad_id)
    # In config.json Llama takes the pad token's embedding from training, which the end token needs.
    return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None if in_config and pad == eos else pad}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
