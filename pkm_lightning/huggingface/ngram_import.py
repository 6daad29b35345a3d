"""A layer with an n-gram table of a Qwen model as a module; in a run, `ffn=engram_pretrained` reads it."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.build.row_files import find_rows
from pkm_lightning.checkpoints.ngram_layout import find_ngrams
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.engram_weights import check_stream, copy_layer, engram_sizes
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.table_rows import copy_rows

__all__ = ["load_ngram_layer"]


def load_ngram_layer(path: str | Path, *, layer: int, stream: int | None = None, mapped: bool = False) -> Engram:
    """Returns a layer of the Qwen model in a folder, in torch's default dtype.

    Its table is `engram.slots()[0].tables[0]`.

    Args:
        path: of the folder, with config.json and *.safetensors.
        layer: number from 0 of a layer with an n-gram table.
        stream: number from 0 of a residual stream; None for all, side by side.
        mapped: whether the rows stay in their files, where each read finds them; else they are copied into memory.

    Raises:
        ConfigError: no such model, layer or stream.
        CheckpointError: a file that is missing, damaged or of another shape.
    """
    folder = find_ngrams(path)
    folder.check_layer(layer)
    check_stream(folder, stream)
    sizes = engram_sizes(folder, [layer], stream)
    dim = folder.sizes.hidden_size * int(sizes["streams"])
    spec = Engram.table_spec(dim=dim, table_number=0, **sizes)
    stored = find_rows({"path": path, "tensor": folder.table_tensor(layer)}, spec, 0, 1)
    if mapped:
        table = ValueTable(rows=spec.rows, dim=spec.dim, device="mmap", trainable=False, stored=stored)
    else:
        table = ValueTable(rows=spec.rows, dim=spec.dim)
        copy_rows(table, stored)
    engram = Engram(
        dim=dim,
        n_layers=1,
        vocab_size=folder.sizes.vocab_size,
        table=table,
        table_number=0,
        canonical=False,
        gate="sigmoid",
        **sizes,
    )
    copy_layer(engram, folder, layer, stream)
    return engram
