"""N-gram tables of a Qwen model on disk (`qwen4_exp` of transformers), read from config.json and safetensors alone.

Each layer in `ple_layer_ids` of config.json (from 1 on) has these tensors, `model.layers.L.ple.NAME` (L from 0):

| NAME | shape | |
|---|---|---|
| `ple_embedding.ngram_embedding.shard_0.weight`, ... | rows x V, together | the table; or whole, without `shard_0` |
| `ple_embedding.layer_multipliers` | M | of the hash, int64 |
| `ple_embedding.ngram_heads_vocab_sizes`, `..._offsets` | K | rows of each head, and those in front of it, int64 |
| `key_proj.weight` | S * C, K * V | a key per residual stream |
| `value_proj.weight` | C, K * V | one value for all streams |
| `norm_key.weight`, `norm_query.weight`, `norm_conv.weight` | S * C | gains, less 1 |
| `conv1d.weight` | S * C, 1, taps | a filter per channel |

Letters: M largest order, K reads per token, V values per row, S residual streams (`hc_count`), C values per stream
(`hidden_size`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.ngram_sizes import NGramSizes, read_config, read_sizes
from pkm_lightning.checkpoints.safetensors import Entry
from pkm_lightning.checkpoints.weight_files import stored_entries
from pkm_lightning.errors import CheckpointError, ConfigError

TABLE = "ple_embedding.ngram_embedding"
MULTIPLIERS = "ple_embedding.layer_multipliers"
HEAD_SIZES = "ple_embedding.ngram_heads_vocab_sizes"
HEAD_OFFSETS = "ple_embedding.ngram_heads_offsets"
#: Stands for the number of a part in the name of a table, as in `table.tensor`.
PART = "*"
_NAME = re.compile(r"((?:model\.)?(?:language_model\.)?(?:model\.)?layers\.)(\d+)\.ple\.(.+)")


@dataclass(frozen=True)
class NGramFolder:
    """The n-gram tables of a model, checked by `find_ngrams`.

    Attributes:
        path: of its folder.
        source: what the path is called in messages.
        sizes: of its layers.
        stored: file and place of each tensor, by the number of its layer and its name from `ple.` on.
        prefix: of the names in its files, up to the number of the layer.
    """

    path: Path
    source: str
    sizes: NGramSizes
    stored: Mapping[tuple[int, str], tuple[Path, Entry]]
    prefix: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor of a layer but the table, by its name."""
        s = self.sizes
        width, channels = s.reads * s.row_dim, s.streams * s.hidden_size
        return {
            MULTIPLIERS: (s.order,),
            HEAD_SIZES: (s.reads,),
            HEAD_OFFSETS: (s.reads,),
            "key_proj.weight": (channels, width),
            "value_proj.weight": (s.hidden_size, width),
            "norm_key.weight": (channels,),
            "norm_query.weight": (channels,),
            "norm_conv.weight": (channels,),
            "conv1d.weight": (channels, 1, s.kernel),
        }

    def check_layer(self, layer: int) -> None:
        """Refuses a layer whose tensors are missing or of another shape or kind.

        Raises:
            ConfigError: it has no table; names those that have one.
            CheckpointError: naming the tensor that does not fit.
        """
        if layer not in self.sizes.layers:
            shown = ", ".join(map(str, self.sizes.layers))
            raise ConfigError(f"layer {layer} of {self.source} has no n-gram table; those that have one: {shown}.")
        for name, shape in self.shapes().items():
            is_index = name in (MULTIPLIERS, HEAD_SIZES, HEAD_OFFSETS)
            _, entry = self._place(layer, name)
            if entry.shape != shape or (entry.dtype != torch.int64 if is_index else not _is_float(entry.dtype)):
                raise self._misfit(layer, name, entry, shape, "int64" if is_index else "floating point")
        for name in self.parts(layer):
            entry = self.stored[layer, name][1]
            if entry.shape[1:] != (self.sizes.row_dim,) or not _is_float(entry.dtype):
                raise self._misfit(layer, name, entry, ("rows", self.sizes.row_dim), "floating point")

    def tensor(self, layer: int, name: str) -> Tensor:
        """Returns a mapped tensor of a layer: to be copied, since a write to it would end the process.

        Raises:
            CheckpointError: it is missing, or its file cannot be read.
        """
        file, entry = self._place(layer, name)
        try:
            return MappedFile(file).tensor(entry.start, entry.dtype, entry.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.source}: {file.name} cannot be read ({error}); fetch it again.") from None

    def parts(self, layer: int) -> list[str]:
        """Returns the names of the parts of a layer's table, one below the other.

        Raises:
            CheckpointError: there are none, or one is missing.
        """
        if (layer, f"{TABLE}.weight") in self.stored:
            return [f"{TABLE}.weight"]
        pattern = re.compile(re.escape(TABLE) + r"\.shard_(\d+)\.weight")
        matches = (pattern.fullmatch(name) for number, name in self.stored if number == layer)
        numbers = {int(match[1]) for match in matches if match}
        names = [f"{TABLE}.shard_{number}.weight" for number in range(max(numbers, default=0) + 1)]
        for name in names:
            self._place(layer, name)
        return names

    def table_tensor(self, layer: int) -> str:
        """Returns the name of a layer's table in the files, in which a star stands for the numbers of its parts."""
        return self.full_name(layer, self.parts(layer)[0].replace("shard_0", f"shard_{PART}"))

    def full_name(self, layer: int, name: str) -> str:
        """Returns the name of a tensor of a layer as the files have it."""
        return f"{self.prefix}{layer}.ple.{name}"

    def _place(self, layer: int, name: str) -> tuple[Path, Entry]:
        if (layer, name) not in self.stored:
            raise CheckpointError(
                f"{self.source} lacks {self.full_name(layer, name)}, which its config.json asks for; fetch its files "
                "again."
            )
        return self.stored[layer, name]

    def _misfit(self, layer: int, name: str, entry: Entry, shape: tuple[Any, ...], kind: str) -> CheckpointError:
        have = f"{' x '.join(map(str, entry.shape))} values of {str(entry.dtype).removeprefix('torch.')}"
        return CheckpointError(
            f"{self.source}: {self.full_name(layer, name)} has {have}, and config.json asks for "
            f"{' x '.join(map(str, shape))} of {kind}; the weights are those of another model."
        )


def find_ngrams(path: str | Path, key: str = "") -> NGramFolder:
    """Returns the n-gram tables of the model in a folder, of whose files only the headers are read.

    Args:
        path: of the folder.
        key: what the path is called in messages, such as `ffn.path=`.

    Raises:
        ConfigError: no folder of such a model, or a model without a table.
        CheckpointError: a file that is missing or damaged.
    """
    path, source = Path(path), f"{key}{path}"
    sizes = read_sizes(read_config(path, source), source)
    stored, prefixes = {}, set()
    for name, place in stored_entries(path, key).items():
        if match := _NAME.fullmatch(name):
            stored[int(match[2]), match[3]] = place
            prefixes.add(match[1])
    if len(prefixes) != 1:
        shown = f" under several names ({', '.join(sorted(prefixes))})" if prefixes else ""
        raise CheckpointError(
            f"{source} holds {'' if prefixes else 'no '}tensors layers.L.ple.*{shown}, which are the n-gram tables of "
            "its config.json; give the folder with all files of the model."
        )
    return NGramFolder(path, source, sizes, stored, prefixes.pop())


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
