"""Exports a checkpoint of any kind as one safetensors file, a block of rows at a time: the model is never in memory.

A folder stores a tensor in chunks, one per rank, split by rows or by columns. A block is put together from the chunks
that overlap it.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

import pkm_lightning
from pkm_lightning.checkpoints.folder import Chunk
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.checkpoints.safetensors import FORMAT_VERSION, Entry, lay_out, with_sums
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import is_stream, written_beside

_BLOCK_BYTES = 64 * 2**20
#: Prefix of the transformer's weights in a checkpoint; an exported file has the names without it.
_MODEL = "state_dict.model."


class WeightSource(Protocol):
    """What a file of weights is written from, such as a `SavedCheckpoint`, with its names."""

    @property
    def skeleton(self) -> Any:
        """The content without tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor."""

    def chunks(self, name: str) -> list[Chunk]:
        """Returns the blocks of a tensor."""

    def forget(self) -> None:
        """Releases the memory of all pages read so far."""


def weight_shapes(checkpoint: WeightSource | QuantizedCheckpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns shape and dtype of the model's weights and buffers, by their names in the model."""
    stored = {n.removeprefix(_MODEL): shape for n, shape in checkpoint.shapes.items() if n.startswith(_MODEL)}
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in stored.items()}


def weight_blocks(checkpoint: WeightSource | QuantizedCheckpoint, name: str) -> Iterator[Tensor]:
    """Yields a weight, by its name in the model, in contiguous blocks of rows of about 64 MiB; see `forget`."""
    yield from _blocks(checkpoint, _MODEL + name)


def write(checkpoint: SavedCheckpoint | QuantizedCheckpoint, path: Path) -> dict[str, Entry]:
    """Writes the model's weights and buffers to `path`, which appears or is replaced when all of it is on disk.

    Returns:
        The place of each tensor in the file.

    Raises:
        CheckpointError: a dtype that the format lacks, an unreadable checkpoint, a full disk, or a folder that cannot
            be written; an earlier file at `path` is whole.
    """
    try:
        return write_tensors(checkpoint, path)
    except OSError as error:
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in weight_shapes(checkpoint).values())
        raise CheckpointError(
            f"file={path} cannot be written ({error.strerror}; it takes {size:,} bytes); free the disk or choose "
            "another place."
        ) from error


def write_tensors(
    checkpoint: WeightSource | QuantizedCheckpoint,
    path: Path,
    renamed: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
) -> dict[str, Entry]:
    """Writes what `write` does, under other names if need be.

    Args:
        checkpoint: of any kind.
        path: of the file.
        renamed: the name in the file of each tensor, for a model of another package; None keeps the names and adds the
            metadata by which this package reads the file.
        tokenizer: digest of the tokenizer beside the file; None: of the one that the checkpoint was trained with.

    Returns:
        The place of each tensor in the file.

    Raises:
        CheckpointError: a dtype that the format lacks, or an unreadable checkpoint.
        OSError: a full disk, or a folder that cannot be written; an earlier file at `path` is whole.
    """
    shapes = weight_shapes(checkpoint)
    names = {name: name for name in shapes} if renamed is None else {new: old for old, new in renamed.items()}
    texts = _texts(checkpoint.skeleton, tokenizer) if renamed is None else {"format": "pt"}
    header, entries = lay_out({new: shapes[old] for new, old in names.items()}, texts)
    size = len(header) + sum(entry.n_bytes for entry in entries.values())
    with written_beside(path) as file:
        if hasattr(os, "posix_fallocate") and not is_stream(path):  # a full disk is noticed now, not after hours
            os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        sums = [_write_tensor(file, checkpoint, names[name]) for name in entries]
        file.seek(0)
        file.write(with_sums(header, sums))
    return entries


def _texts(checkpoint: Mapping[str, Any], tokenizer: str | None) -> dict[str, str]:
    """Returns the metadata of the file; `pkm_lightning.checkpoints.safetensors` has the table."""
    texts = {
        "format": "pt",
        "pkm_lightning_format": FORMAT_VERSION,
        "pkm_lightning_version": pkm_lightning.__version__,
        "config": json.dumps(checkpoint["hyper_parameters"]["config"]),
        "tokens_seen": str(int(checkpoint["tokens_seen"])),
    }
    known = {"tokenizer": tokenizer or checkpoint.get("tokenizer"), "data": checkpoint.get("data")}
    return {**texts, **{name: str(value) for name, value in known.items() if value is not None}}


def _write_tensor(file: IO[bytes], checkpoint: WeightSource | QuantizedCheckpoint, name: str) -> int:
    """Writes the values of a tensor, and returns their sum."""
    crc = 0
    for block in _blocks(checkpoint, _MODEL + name):
        if block.numel():
            # As bytes, since NumPy has no bfloat16.
            values = block.detach().reshape(-1).view(torch.uint8).numpy().data
            file.write(values)
            crc = zlib.crc32(values, crc)
        checkpoint.forget()  # else pages that are no longer needed fill the memory
    return crc


def _blocks(checkpoint: WeightSource | QuantizedCheckpoint, name: str) -> Iterator[Tensor]:
    """Yields the tensor's rows in order, in contiguous blocks of about 64 MiB (before they are quantised)."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        origin, part = checkpoint.origin(name)
        blocks = _blocks(checkpoint.saved, origin)
        yield from blocks if part is None else (checkpoint.part(block, name) for block in blocks)
        return
    shape, dtype = checkpoint.shapes[name]
    chunks = checkpoint.chunks(name)
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, rows, step):
        yield _block(chunks, tuple(shape), dtype, start, min(start + step, rows))


def _block(chunks: Sequence[Chunk], shape: tuple[int, ...], dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Returns rows `start` to `end`; a view where one chunk holds all of them."""
    if not shape:  # a scalar has no rows
        return chunks[0].values
    block = None
    for offsets, values in chunks:
        low, high = max(start, offsets[0]), min(end, offsets[0] + values.shape[0])
        if low >= high or 0 in values.shape:
            continue
        part = values[low - offsets[0] : high - offsets[0]]
        if part.shape == (end - start, *shape[1:]):
            return part.contiguous()
        if block is None:
            block = torch.empty(end - start, *shape[1:], dtype=dtype)
        target = block[low - start : high - start]
        for axis in range(1, len(shape)):
            target = target.narrow(axis, offsets[axis], values.shape[axis])
        target.copy_(part)
    return torch.empty(end - start, *shape[1:], dtype=dtype) if block is None else block
