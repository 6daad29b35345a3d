"""Writes the Engram layers of a model as those of a Qwen model with n-gram tables, under the names of transformers.

`pkm_lightning.checkpoints.ngram_layout` has the names. A layer that was read for one residual stream is put back among
the others, which the folder that it came from still holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pkm_lightning.build.instantiate import check_trusted, target_class
from pkm_lightning.build.loading import saved_tokenizer
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.row_files import map_rows
from pkm_lightning.build.saving import HasModel
from pkm_lightning.build.variants import MAIN, Variant, variants
from pkm_lightning.checkpoints.companions import TOKENIZER
from pkm_lightning.checkpoints.export import WeightSource, write_tensors
from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.ngram_layout import find_ngrams
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.pretrained_engram import PretrainedEngram
from pkm_lightning.huggingface.ngram_tensors import InMemory, NGramLayer, NGramTensors
from pkm_lightning.model import Transformer
from pkm_lightning.storage import folder_written_beside

__all__ = ["save_ngram_layers"]

_GROUPS = ("model", "ffn", "placement", "table", "extra_ffns")


@dataclass(frozen=True)
class WrittenNGrams:
    """What was written.

    Attributes:
        layers: numbers from 0 of the layers in the folder.
        n_tensors, n_bytes: of their tensors.
        has_tokenizer: whether the training's tokenizer was found.
    """

    layers: list[int]
    n_tensors: int
    n_bytes: int
    has_tokenizer: bool


def write_ngrams(checkpoint: SavedCheckpoint, folder: Path) -> WrittenNGrams:
    """Writes `folder`, which appears or is replaced when it is complete; tables are copied in blocks.

    Args:
        checkpoint: of any kind, with all of its rows.
        folder: to write.

    Raises:
        ConfigError: the model has no Engram layer, or one that Qwen's layers do not compute, or classes of the user's.
        CheckpointError: weights that do not fit their configuration, streams that are gone, a full disk.
    """
    config = checkpoint.config
    check_trusted({group: config.get(group) for group in _GROUPS}, str(checkpoint.path))
    model = build_meta_model(config)
    checkpoint.check_weights({f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()})
    return _write(model, config, checkpoint, folder, saved_tokenizer(checkpoint))


def save_ngram_layers(holder: HasModel, folder: str | Path) -> list[int]:
    """Writes the Engram layers of a model in memory as `write_ngrams` does, and returns their numbers in the folder.

    Args:
        holder: what `pkm_lightning.load` returned, or a `LanguageModule` after `configure_model`.
        folder: to write; a folder there is replaced.

    Raises:
        ConfigError, CheckpointError: as `write_ngrams`; a table that is split over ranks, or whose file is gone.
    """
    if any(table.is_split for table in holder.model.value_tables):
        raise CheckpointError(
            "the model's table is split over ranks; save a checkpoint, and write that with: export ckpt=CHECKPOINT "
            "format=ngram dir=FOLDER."
        )
    tokenizer = getattr(holder, "tokenizer", None)
    settings = _variant(holder.config).table
    source = InMemory(holder.model.state_dict(), _rows_in_files(holder.model, settings))
    return _write(holder.model, holder.config, source, Path(folder), tokenizer).layers


def _rows_in_files(model: Transformer, settings: Mapping[str, Any]) -> dict[str, list[tuple[MappedFile, Tensor]]]:
    """Returns the mapped rows of Engram layers whose tables, by these `settings`, stay in a file."""
    names, rows = _names(model), {}
    for _, _, plugin in model.plugins():
        for table in plugin.slots()[0].tables if isinstance(plugin, Engram) else ():
            if table.stored is None:
                continue
            parts = map_rows(settings, table.stored.digest.tolist())
            if not parts:
                raise CheckpointError(f"table.path={table.stored.path} holds other rows than at first; restore it.")
            rows[f"{names[id(table)]}.weight"] = parts
    return rows


def _write(
    model: Transformer, config: Mapping[str, Any], source: WeightSource, folder: Path, tokenizer: Any
) -> WrittenNGrams:
    variant = _variant(config)
    names = _names(model)
    layers = [_layer(names, number, plugin) for number, _, plugin in model.plugins() if isinstance(plugin, Engram)]
    _check_expressible(variant, layers)
    content = NGramTensors(source, layers)
    described = _described(variant, config["model"], layers, content)
    try:
        with folder_written_beside(folder) as beside:
            entries = write_tensors(content, beside / "model.safetensors", content.names)
            (beside / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            if isinstance(tokenizer, Tokenizer):
                tokenizer.save(beside / TOKENIZER)
    except OSError as error:
        raise CheckpointError(
            f"dir={folder} cannot be written ({error.strerror}); free the disk or choose another place."
        ) from error
    size = sum(entry.n_bytes for entry in entries.values())
    return WrittenNGrams([layer.number for layer in layers], len(entries), size, isinstance(tokenizer, Tokenizer))


def _names(model: Transformer) -> dict[int, str]:
    """Returns the names of all modules by their ids."""
    return {id(module): name for name, module in model.named_modules()}


def _layer(names: Mapping[int, str], number: int, plugin: Engram) -> NGramLayer:
    (table,) = plugin.slots()[0].tables
    origin = None
    if isinstance(plugin, PretrainedEngram):
        number = plugin.layer
        if plugin.stream is not None:
            origin = find_ngrams(plugin.path, "ffn.path=")
            origin.check_layer(number)
    stream = plugin.stream if isinstance(plugin, PretrainedEngram) else None
    return NGramLayer(number, plugin, names[id(plugin)], names[id(table)], origin, stream)


def _variant(config: Mapping[str, Any]) -> Variant:
    """Returns the variant whose layers have n-gram tables.

    Raises:
        ConfigError: there is none, or several, which one config.json cannot describe.
    """
    matches = [v for v in variants(config) if issubclass(target_class(v.ffn, v.key), Engram)]
    if len(matches) != 1:
        shown = (
            "no layer with an n-gram table (ffn=engram)"
            if not matches
            else f"{len(matches)} variants with n-gram tables"
        )
        raise ConfigError(f"format=ngram: the model has {shown}; it writes those of one variant.")
    return matches[0]


def _check_expressible(variant: Variant, layers: Sequence[NGramLayer]) -> None:
    """Refuses what Qwen's layer does not compute.

    Raises:
        ConfigError: naming the key.
    """
    ffn, first = variant.ffn, layers[0].plugin
    largest = max(first.addressing.orders)
    allowed = {
        "orders": (list(first.addressing.orders), list(range(2, largest + 1))),
        "dilation": (first.conv.dilation[0], largest),
        "gate": (ffn.get("gate", "sigmoid"), "sigmoid"),
        "canonical": (ffn.get("canonical", False), False),
        "rows": ("1" if ffn["rows"] == 1 else "more", "more"),
    }
    for name, (value, expected) in allowed.items():
        if value != expected:
            key = f"{variant.key}.{name}" if variant.name == MAIN else f"{variant.key}.ffn.{name}"
            raise ConfigError(
                f"format=ngram cannot express {key}={ffn[name]}: Qwen's layer has {name}={expected}; use "
                "file=NAME.safetensors or format=hf."
            )
    if len({layer.table for layer in layers}) < len(layers):
        raise ConfigError(
            f"format=ngram: {len(layers)} layers share a table (table.shared=true), and in Qwen's layout each has "
            "one of its own; use file=NAME.safetensors or format=hf."
        )


def _described(
    variant: Variant, model: Mapping[str, Any], layers: Sequence[NGramLayer], content: NGramTensors
) -> dict[str, Any]:
    """Returns the part of config.json that describes the layers."""
    ffn, plugin = variant.ffn, layers[0].plugin
    return {
        "model_type": "qwen4_exp_text",
        "dtype": str(content.dtype).removeprefix("torch."),
        "vocab_size": int(model["vocab_size"]),
        "hidden_size": plugin.value.out_features,
        "hc_count": plugin.streams if layers[0].origin is None else layers[0].origin.sizes.streams,
        "rms_norm_eps": plugin.conv_norm.eps,
        "eos_token_id": content.end_id,
        "ple_layer_ids": [layer.number + 1 for layer in layers],
        "ple_embed_dim": plugin.value.in_features,
        "ple_conv_kernel_size": plugin.conv.kernel_size[0],
        "ngram_size": max(plugin.addressing.orders),
        "heads_per_ngram": plugin.addressing.heads,
        "ngram_vocab_size_base": ffn["rows"],
        "make_ngram_vocab_size_divisible_by": ffn["row_multiple"],
        "seed": ffn["seed"],
        "split_ngram_parts": 1,
    }
