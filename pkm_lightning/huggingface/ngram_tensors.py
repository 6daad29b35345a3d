"""The tensors of Engram layers under Qwen's names, as something that a file of weights is written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pkm_lightning.checkpoints.export import WeightSource
from pkm_lightning.checkpoints.folder import Chunk
from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.ngram_layout import TABLE, NGramFolder
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.engram_weights import HASH, SHARED, WEIGHTS

_MODEL = "state_dict.model."


class NGramLayer(NamedTuple):
    """A layer to write.

    Attributes:
        number: in the folder, from 0.
        plugin: its module, which may be on the meta device.
        module, table: the names of the module and of its table in the model.
        origin: the folder with the other residual streams; None where `plugin` has all.
        stream: number of that of `plugin` among them.
    """

    number: int
    plugin: Engram
    module: str
    table: str
    origin: NGramFolder | None
    stream: int | None


class InMemory:
    """The weights of a model in memory, in the way of a `SavedCheckpoint`.

    Args:
        state: of the model.
        rows: mapped parts of the tables that stay in files, one below the other, by the names of their tensors.
    """

    skeleton: Mapping[str, object] = {}

    def __init__(self, state: Mapping[str, Tensor], rows: Mapping[str, Sequence[tuple[MappedFile, Tensor]]]) -> None:
        self._state = {f"{_MODEL}{name}": value.detach().cpu() for name, value in state.items()}
        self._rows = {f"{_MODEL}{name}": parts for name, parts in rows.items()}
        self.shapes = {name: (value.shape, value.dtype) for name, value in self._state.items()}
        for name, parts in self._rows.items():
            first = parts[0][1]
            self.shapes[name] = torch.Size((sum(len(part) for _, part in parts), first.shape[1])), first.dtype

    def chunks(self, name: str) -> list[Chunk]:
        """Returns a tensor as one block, rows in files as one per part."""
        if name not in self._rows:
            return [Chunk((0,) * self._state[name].ndim, self._state[name])]
        parts = [part for _, part in self._rows[name]]
        starts = accumulate(map(len, parts), initial=0)
        return [Chunk((start, 0), part) for start, part in zip(starts, parts, strict=False)]

    def forget(self) -> None:
        """Releases the memory of pages that were read."""
        for parts in self._rows.values():
            for file, _ in parts:
                file.forget()


class NGramTensors:
    """The tensors of `layers`, in the way of a `SavedCheckpoint`, by their names in the folder.

    Args:
        source: of the weights of the whole model.
        layers: one or more.

    Attributes:
        names: of the tensors, each by itself.
        shapes: shape and dtype of each, by its name in a checkpoint.
        end_id: the token that ends a document.
        dtype: of the weights.
    """

    def __init__(self, source: WeightSource, layers: Sequence[NGramLayer]) -> None:
        self._source, self.skeleton = source, source.skeleton
        self._names: dict[str, str] = {}
        self._others: dict[str, tuple[Tensor, int]] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for layer in layers:
            prefix = f"model.layers.{layer.number}.ple."
            self._add(f"{prefix}{TABLE}.weight", f"{layer.table}.weight")
            for part, qwen_name in {**WEIGHTS, **HASH}.items():
                name = f"{prefix}{qwen_name}"
                if layer.origin is not None and layer.stream is not None and part in WEIGHTS and part != SHARED:
                    start = layer.stream * layer.origin.sizes.hidden_size
                    self._others[f"{_MODEL}{name}"] = (layer.origin.tensor(layer.number, qwen_name), start)
                self._add(name, f"{layer.module}.{part}")
        self.names = {name.removeprefix(_MODEL): name.removeprefix(_MODEL) for name in self.shapes}
        (end,) = source.chunks(f"{_MODEL}{layers[0].module}.addressing.end_id")
        self.end_id = int(end.values)
        self.dtype = source.shapes[f"{_MODEL}{layers[0].module}.{SHARED}"][1]

    def _add(self, name: str, of_model: str) -> None:
        name, of_model = f"{_MODEL}{name}", f"{_MODEL}{of_model}"
        self._names[name] = of_model
        shape, dtype = self._source.shapes[of_model]
        if name in self._others:
            whole = self._others[name][0]
            # Wide enough for the values of both.
            shape, dtype = whole.shape, torch.promote_types(whole.dtype, dtype)
        self.shapes[name] = (shape, dtype)

    def chunks(self, name: str) -> list[Chunk]:
        """Returns the blocks of a tensor; those of other residual streams are copies."""
        chunks = self._source.chunks(self._names[name])
        if name not in self._others:
            return chunks
        (whole, start), dtype = self._others[name], self.shapes[name][1]
        end = start + self._source.shapes[self._names[name]][0][0]
        rest = (0,) * (whole.ndim - 1)
        middle = [Chunk((start + offsets[0], *offsets[1:]), values.to(dtype)) for offsets, values in chunks]
        return [Chunk((0, *rest), whole[:start].to(dtype)), *middle, Chunk((end, *rest), whole[end:].to(dtype))]

    def forget(self) -> None:
        """Releases the memory of pages that were read."""
        self._source.forget()
