"""Folders of Qwen models with n-gram tables, written without transformers and without the rest of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pkm_lightning.checkpoints.ngram_layout import HEAD_OFFSETS, HEAD_SIZES, MULTIPLIERS, TABLE
from pkm_lightning.checkpoints.safetensors import lay_out
from pkm_lightning.memory.token_addressing import hash_multipliers, head_sizes, padded_rows

#: The part of config.json that describes the tables: two layers of two streams, four reads of three values per token.
CONFIG: dict[str, Any] = {
    "model_type": "qwen4_exp_text",
    "vocab_size": 600,
    "hidden_size": 8,
    "hc_count": 2,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 3,
    "num_hidden_layers": 5,
    "ple_layer_ids": [2, 5],
    "ple_embed_dim": 12,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 40,
    "make_ngram_vocab_size_divisible_by": 128,
    "seed": 5,
    "split_ngram_parts": 4,
}
#: The numbers of its layers with a table, from 0.
LAYERS = (1, 4)


def hash_of(config: dict[str, Any], number: int) -> dict[str, Tensor]:
    """Returns the hash of table `number` of a model."""
    reads = (config["ngram_size"] - 1) * config["heads_per_ngram"]
    sizes = torch.tensor(head_sizes(reads, config["ngram_vocab_size_base"], number))
    multipliers = hash_multipliers(config["ngram_size"], config["vocab_size"], config["seed"], number)
    return {MULTIPLIERS: torch.tensor(multipliers), HEAD_SIZES: sizes, HEAD_OFFSETS: sizes.cumsum(0) - sizes}


def rows_of(config: dict[str, Any], number: int) -> int:
    """Returns the rows of table `number`."""
    return padded_rows(hash_of(config, number)[HEAD_SIZES].tolist(), config["make_ngram_vocab_size_divisible_by"])


def layer_tensors(config: dict[str, Any], number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draws the tensors of table `number` and its layer, by their names from `ple.` on; the table is whole."""
    channels, width = config["hc_count"] * config["hidden_size"], config["ple_embed_dim"]
    reads = (config["ngram_size"] - 1) * config["heads_per_ngram"]
    shapes = {
        "key_proj.weight": (channels, width),
        "value_proj.weight": (config["hidden_size"], width),
        "norm_key.weight": (channels,),
        "norm_query.weight": (channels,),
        "norm_conv.weight": (channels,),
        "conv1d.weight": (channels, 1, config["ple_conv_kernel_size"]),
        f"{TABLE}.weight": (rows_of(config, number), width // reads),
    }
    return {**{n: torch.randn(shape).to(dtype) for n, shape in shapes.items()}, **hash_of(config, number)}


def write_folder(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    parts: int = 4,
    files: int = 1,
    prefix: str = "model.",
    changes: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes a model's folder; returns its tensors with whole tables, by their names from `layers.` on.

    Args:
        folder: to make.
        dtype: of the weights.
        parts: of each table; 1 writes it whole.
        files: to spread the tensors over, with an index if there are several.
        prefix: in front of the names.
        changes: of `CONFIG`.
    """
    config = {**CONFIG, **(changes or {})}
    whole: dict[str, Tensor] = {}
    for number, layer in enumerate(config["ple_layer_ids"]):
        tensors = layer_tensors(config, number, dtype)
        whole |= {f"layers.{layer - 1}.ple.{name}": value for name, value in tensors.items()}
    stored = {"embed_tokens.weight": torch.zeros(2, 2)}
    for name, value in whole.items():
        if not name.endswith(f"{TABLE}.weight") or parts == 1:
            stored[name] = value
            continue
        for part, rows in enumerate(value.chunk(parts)):
            stored[name.replace(".weight", f".shard_{part}.weight")] = rows.contiguous()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, {f"{prefix}{name}": value for name, value in stored.items()}, files)
    return whole


def write_tensors(folder: Path, tensors: dict[str, Tensor], files: int) -> None:
    """Writes tensors into one file, or in turn into several with an index."""
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    place = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        save_file({name: value for name, value in tensors.items() if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def write_sparse(folder: Path, changes: dict[str, Any]) -> int:
    """Writes a model of one layer whose table is a hole in a sparse file, in bf16; returns the bytes of the table."""
    config = {**CONFIG, "ple_layer_ids": [1], **changes}
    reads = (config["ngram_size"] - 1) * config["heads_per_ngram"]
    values = config["ple_embed_dim"] // reads
    small = {**config, "ngram_vocab_size_base": 1_000, "make_ngram_vocab_size_divisible_by": 1}
    tensors = {**layer_tensors(small, 0, torch.bfloat16), **hash_of(config, 0)}
    del tensors[f"{TABLE}.weight"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    prefix = "model.layers.0.ple."
    rows = rows_of(config, 0)
    names = [f"{prefix}{TABLE}.shard_{part}.weight" for part in range(config["split_ngram_parts"])]
    of_part = -(-rows // len(names))
    shapes = {name: ((min(of_part, rows - part * of_part), values), torch.bfloat16) for part, name in enumerate(names)}
    header, entries = lay_out(shapes, {"format": "pt"})
    with (folder / "model-00001-of-00002.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.n_bytes for entry in entries.values()))
    save_file(
        {f"{prefix}{name}": value for name, value in tensors.items()}, folder / "model-00002-of-00002.safetensors"
    )
    return rows * values * 2
