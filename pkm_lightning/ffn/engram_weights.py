"""Weights, hash and rows of an Engram layer under the names and shapes of Qwen's layer with an n-gram table.

Letters: C values per residual stream, K reads per token, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.checkpoints.ngram_layout import (
    HEAD_OFFSETS,
    HEAD_SIZES,
    MULTIPLIERS,
    NGramFolder,
)
from pkm_lightning.errors import CheckpointError, ConfigError, check_integer
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.memory.token_addressing import SEED_STRIDE, head_sizes

if TYPE_CHECKING:
    from torch import Tensor

#: Qwen's names of the weights, by ours. All but the value have a part per stream.
WEIGHTS = {
    "key.weight": "key_proj.weight",
    "value.weight": "value_proj.weight",
    "key_norm.weight": "norm_key.weight",
    "query_norm.weight": "norm_query.weight",
    "conv_norm.weight": "norm_conv.weight",
    "conv.weight": "conv1d.weight",
}
SHARED = "value.weight"
#: Qwen's names of the hash, by ours.
HASH = {
    "addressing.multipliers": MULTIPLIERS,
    "addressing.head_sizes": HEAD_SIZES,
    "addressing.head_offsets": HEAD_OFFSETS,
}


def engram_sizes(folder: NGramFolder, layers: Sequence[int], stream: int | None) -> dict[str, Any]:
    """Returns the arguments of `Engram` that make it the `layers` of a folder, as tables 0, 1, ...

    A layer alone is table 0: it begins with the primes and the seed of its number in the folder.

    Raises:
        ConfigError: several layers that are not the first ones of the folder.
    """
    s = folder.sizes
    numbers = [s.layers.index(layer) for layer in layers]
    rows, seed = s.rows, s.seed
    if len(numbers) == 1:
        rows, seed = head_sizes(s.reads, s.rows, numbers[0])[0], s.seed + SEED_STRIDE * numbers[0]
    elif numbers != list(range(len(numbers))):
        raise ConfigError(
            f"ffn.layers={list(layers)} are not the first {len(numbers)} layers with an n-gram table of "
            f"{folder.source} ({', '.join(map(str, s.layers))}), and primes follow from the number of the table; take "
            "the first ones, or one alone (several variants: extra_ffns)."
        )
    return {
        "orders": list(range(2, s.order + 1)),
        "heads": s.heads,
        "rows": rows,
        "row_dim": s.row_dim,
        "kernel": s.kernel,
        "dilation": s.order,
        "streams": s.streams if stream is None else 1,
        "seed": seed,
        "row_multiple": s.row_multiple,
        "norm_eps": s.norm_eps,
        "end_id": s.end_id,
    }


@torch.no_grad()
def copy_layer(engram: Engram, folder: NGramFolder, layer: int, stream: int | None) -> None:
    """Gives `engram` the weights and the hash of a layer; a hash that differs from the computed one is taken.

    Raises:
        ConfigError: the module computes something else with such weights.
        CheckpointError: a hash whose rows are not in the table, or a file that cannot be read.
    """
    _check_module(engram, folder, stream)
    state = engram.state_dict()
    C = folder.sizes.hidden_size
    for name, qwen_name in WEIGHTS.items():
        values = folder.tensor(layer, qwen_name)
        if stream is not None and name != SHARED:
            values = values[stream * C : (stream + 1) * C]
        if values.shape != state[name].shape:
            raise ConfigError(
                f"{name} of this module has the shape {tuple(state[name].shape)}, and {qwen_name} of {folder.source} "
                f"{tuple(values.shape)}; give it the sizes of config.json."
            )
        state[name].copy_(values)
    (table,) = engram.slots()[0].tables
    sizes_K, offsets_K = folder.tensor(layer, HEAD_SIZES), folder.tensor(layer, HEAD_OFFSETS)
    if not _fit(sizes_K, offsets_K, table.rows):
        raise CheckpointError(
            f"{folder.source}: {folder.full_name(layer, HEAD_SIZES)} leads beyond the {table.rows:,} rows of the "
            "table; the weights are those of another model."
        )
    for name, qwen_name in HASH.items():
        state[name].copy_(folder.tensor(layer, qwen_name))


def _fit(sizes_K: Tensor, offsets_K: Tensor, rows: int) -> bool:
    return bool((sizes_K >= 1).all() and (offsets_K >= 0).all() and (offsets_K + sizes_K <= rows).all())


def _check_module(engram: Engram, folder: NGramFolder, stream: int | None) -> None:
    """Refuses what no shape shows: another convolution, norm, end token or vocabulary.

    Raises:
        ConfigError: naming both values.
    """
    s = folder.sizes
    check_stream(folder, stream)
    identity_W = torch.arange(s.vocab_size)
    pairs = {
        "streams": (engram.streams, s.streams if stream is None else 1),
        "orders": (list(engram.addressing.orders), list(range(2, s.order + 1))),
        "dilation": (engram.conv.dilation[0], s.order),
        "norm_eps": (engram.conv_norm.eps, s.norm_eps),
        "end_id": (int(engram.addressing.end_id), s.end_id),
        "vocab_size": (len(engram.addressing.canonical_ids), s.vocab_size),
        "gate": ("none" if engram.key is None else "sigmoid" if engram.takes_root else "no_root", "sigmoid"),
        "canonical": (not torch.equal(engram.addressing.canonical_ids.cpu(), identity_W), False),
    }
    for name, (value, expected) in pairs.items():
        if value != expected:
            raise ConfigError(
                f"{name}={value} of this module contradicts the {expected} of {folder.source}; set the latter."
            )


def check_stream(folder: NGramFolder, stream: int | None) -> None:
    """Refuses the number of a residual stream that the folder's model has not.

    Raises:
        ConfigError: naming those that it has.
    """
    if stream is not None:
        check_integer("ffn.stream", stream)
    if stream is not None and not 0 <= stream < folder.sizes.streams:
        raise ConfigError(
            f"ffn.stream={stream}: {folder.source} has {folder.sizes.streams} residual streams; allowed: 0 to "
            f"{folder.sizes.streams - 1}, or null for all."
        )
