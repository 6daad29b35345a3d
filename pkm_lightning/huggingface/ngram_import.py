"""Reads a layer with an n-gram table of a Qwen model into a module in memory; `ffn=engram_pretrained` is for `fit`."""

from __future__ import annotations

from pathlib import Path

import torch

from pkm_lightning.checkpoints.ngram_layout import find_ngrams
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.engram_weights import copy_layer

__all__ = ["load_ngram_layer"]

#: Bytes of a table that are copied at a time.
_BLOCK_BYTES = 64 * 2**20


def load_ngram_layer(engram: Engram, path: str | Path, *, layer: int, stream: int | None = None) -> None:
    """Gives `engram` the weights, hash and rows of a layer of the Qwen model in a folder.

    Args:
        engram: with the sizes that `pkm_lightning.ffn.engram_weights.engram_sizes` returns.
        path: of the folder.
        layer: number from 0 of a layer with an n-gram table.
        stream: number from 0 of the residual stream; None for all.

    Raises:
        ConfigError: sizes that differ, a layer without a table, or rows that are split over ranks.
        CheckpointError: a file that is missing, damaged or of another shape.
    """
    folder = find_ngrams(path)
    folder.check_layer(layer)
    copy_layer(engram, folder, layer, stream)
    (table,) = engram.slots()[0].tables
    parts = [folder.tensor(layer, name) for name in folder.parts(layer)]
    rows = sum(len(part) for part in parts)
    if table.weight.shape != (rows, folder.sizes.row_dim):
        raise ConfigError(
            f"layer {layer} of {folder.source} has a table of {rows:,} x {folder.sizes.row_dim} values, and this one "
            f"has {' x '.join(f'{size:,}' for size in table.weight.shape)}; read a split or mapped table by table.path."
        )
    with torch.no_grad():
        start = 0
        for part in parts:
            step = max(1, _BLOCK_BYTES // (part.shape[1] * part.element_size()))
            for first in range(0, len(part), step):
                block = part[first : first + step]
                table.weight[start + first : start + first + len(block)] = block.to(table.weight.device)
            start += len(part)
