"""One safetensors file from a checkpoint of any kind, a block of rows at a time: no model ever lies in memory.

A folder's tensor is stored in chunks, a rank's part each, split by rows or by columns: a block is put together from
the chunks that it touches.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

import pkm_lightning
from pkm_lightning.checkpoints.mapped import MappedFile, map_archive
from pkm_lightning.checkpoints.safetensors import FORMAT_VERSION, Entry, plan
from pkm_lightning.checkpoints.sharded import SavedTensors
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import flush

_BLOCK_BYTES = 64 * 2**20
#: Of a name in a checkpoint; what follows is the name in the transformer.
_MODEL = "model."


class Chunk(NamedTuple):
    """A part of a tensor and where it stands in it."""

    offsets: tuple[int, ...]
    values: Tensor


class WeightSource:
    """The model's weights and buffers in a checkpoint, a folder or a single file, mapped.

    Attributes:
        rest: everything else in the checkpoint but optimizer states, as `torch.load` gives it.
        shapes: shape and dtype by the name in the transformer.

    Raises:
        CheckpointError: missing, damaged or no checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, MappedFile] = {}
        self._folder = SavedTensors(path) if path.is_dir() else None
        if self._folder is not None:
            self.rest = self._folder.read_rest(("optimizer_states", "state_dict"))
            self.rest["state_dict"] = {}
            self._stored = FileSystemReader(path).read_metadata()
            prefix = f"state_dict.{_MODEL}"
            found = {n.removeprefix(prefix): told for n, told in self._folder.shapes.items() if n.startswith(prefix)}
            self.shapes = {name: (tuple(shape), dtype) for name, (shape, dtype) in found.items()}
            return
        self.rest = map_checkpoint(path, self._file(path))
        state = self.rest.get("state_dict") if isinstance(self.rest, dict) else None
        state = state if isinstance(state, dict) else {}
        self._whole = {n.removeprefix(_MODEL): value for n, value in state.items() if n.startswith(_MODEL)}
        self.shapes = {name: (tuple(value.shape), value.dtype) for name, value in self._whole.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows in order, in contiguous blocks of about 64 MiB; memory of earlier blocks is given back."""
        shape, dtype = self.shapes[name]
        chunks = self._chunks(name)
        rows = shape[0] if shape else 1
        step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, rows, step):
            yield _block(chunks, shape, dtype, start, min(start + step, rows))
            for file in self._files.values():
                file.forget()

    def _file(self, path: Path) -> MappedFile:
        try:
            if path.name not in self._files:
                self._files[path.name] = MappedFile(path)
        except FileNotFoundError:
            raise CheckpointError(f"ckpt={path} does not exist.") from None
        except (OSError, ValueError):
            raise CheckpointError(f"ckpt={path} is damaged or no checkpoint; use another one.") from None
        return self._files[path.name]

    def _chunks(self, name: str) -> list[Chunk]:
        if self._folder is None:
            return [Chunk((0,) * self._whole[name].ndim, self._whole[name])]
        told = self._stored.state_dict_metadata[f"state_dict.{_MODEL}{name}"]
        assert isinstance(told, TensorStorageMetadata)
        chunks = []
        for part in told.chunks:
            place = self._stored.storage_data[MetadataIndex(f"state_dict.{_MODEL}{name}", part.offsets)]
            try:
                values = map_archive(self._file(self.path / place.relative_path), place.offset, place.length)
                assert tuple(values.shape) == tuple(part.sizes)
            except Exception:  # torch raises half a dozen kinds for what it cannot read
                raise CheckpointError(
                    f"ckpt={self.path} is damaged ({place.relative_path} at byte {place.offset}); use another one."
                ) from None
            chunks.append(Chunk(tuple(part.offsets), values))
        return chunks


def map_checkpoint(path: Path, file: MappedFile | None = None) -> Any:
    """The content of a single-file checkpoint, its tensors mapped: they cannot be written to.

    Raises:
        CheckpointError: missing, damaged or no checkpoint.
    """
    try:
        return map_archive(MappedFile(path) if file is None else file)
    except FileNotFoundError:
        raise CheckpointError(f"ckpt={path} does not exist.") from None
    except Exception:  # torch raises half a dozen kinds for a file that it cannot read
        raise CheckpointError(f"ckpt={path} is damaged or no checkpoint; use another one.") from None


def _block(chunks: Sequence[Chunk], shape: tuple[int, ...], dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Rows `start` to `end`; a view of its chunk where one chunk holds them."""
    if not shape:
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
        place = block[low - start : high - start]
        for axis in range(1, len(shape)):
            place = place.narrow(axis, offsets[axis], values.shape[axis])
        place.copy_(part)
    return torch.empty(end - start, *shape[1:], dtype=dtype) if block is None else block


def texts_of(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of the run; see `pkm_lightning.checkpoints.safetensors`."""
    texts = {
        "format": "pt",
        "pkm_lightning_format": FORMAT_VERSION,
        "pkm_lightning_version": pkm_lightning.__version__,
        "config": json.dumps(checkpoint["hyper_parameters"]["config"]),
        "tokens_seen": str(int(checkpoint["tokens_seen"])),
    }
    tokenizer = checkpoint.get("tokenizer")
    return texts if tokenizer is None else {**texts, "tokenizer": str(tokenizer)}


def write(source: WeightSource, texts: Mapping[str, str], path: Path) -> dict[str, Entry]:
    """Writes the weights to `path`, on disk before the name appears; what bore the name before is replaced.

    Returns:
        Where each tensor lies in the file.

    Raises:
        CheckpointError: a dtype that the format lacks, an unreadable checkpoint, a full disk, or a place that cannot be
            written; nothing is left half-written.
    """
    header, entries = plan(source.shapes, texts)
    size = len(header) + sum(entry.n_bytes for entry in entries.values())
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after hours
                os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
            for name in entries:
                _write_tensor(file, source, name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        flush(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"file={path} cannot be written ({error.strerror}; it takes {size:,} bytes); free the disk or choose "
            "another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return entries


def _write_tensor(file: IO[bytes], source: WeightSource, name: str) -> None:
    for block in source.blocks(name):
        if block.numel():
            file.write(block.detach().reshape(-1).view(torch.uint8).numpy().data)
