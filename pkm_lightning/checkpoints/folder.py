"""Reads a checkpoint folder that several ranks wrote, in parts; `pkm_lightning.checkpoints.sharded` has the format."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile, load_archive, map_archive
from pkm_lightning.checkpoints.metadata import MetadataReader, read_metadata
from pkm_lightning.checkpoints.sums import ALL, Share, check_archive, check_skeleton
from pkm_lightning.errors import CheckpointError, CheckpointWriteError
from pkm_lightning.ops.ranks import is_distributed

SKELETON = "skeleton.pt"


class Chunk(NamedTuple):
    """A block of a tensor and the offset of its first value in each dimension."""

    offsets: tuple[int, ...]
    values: Tensor


class FolderContent:
    """The tensors of a folder, read on demand.

    Attributes:
        skeleton: the checkpoint with names in place of tensors.
        shapes: shape and dtype by name.

    Raises:
        Exception: torch's, of half a dozen classes, for what it cannot read.
        DamagedFileError: a file is cut short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, MappedFile] = {}
        # Small: every rank reads it whole.
        skeleton = MappedFile(path / SKELETON)
        try:
            check_skeleton(skeleton)
        except DamagedFileError as error:
            raise DamagedFileError(f"{SKELETON}: {error}") from None
        self.skeleton: Any = load_archive(skeleton)
        self._metadata = read_metadata(path)
        _check_sizes(path, self._metadata)
        stored = self._metadata.state_dict_metadata.items()
        self.shapes = {n: (m.size, m.properties.dtype) for n, m in stored if isinstance(m, TensorStorageMetadata)}

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fills `targets` in place, of a DTensor this rank's part. Collective: call on all ranks.

        Raises:
            CheckpointError: a file cannot be read.
        """
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended in one process
                reader = MetadataReader(self._path, self._metadata)
                dcp.load(targets, storage_reader=reader, no_dist=not is_distributed())
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
            reason = failure_reason(error, otherwise="a part of it is damaged")
            raise CheckpointError(f"{self._path} cannot be read ({reason}); use another one.") from error

    def mapped(self, names: list[str]) -> dict[str, Tensor]:
        """Returns whole tensors in memory: a tensor of several chunks cannot be mapped in one piece."""
        tensors = {name: torch.empty(self.shapes[name][0], dtype=self.shapes[name][1]) for name in names}
        self.read_into(tensors)
        return tensors

    def chunks(self, name: str) -> list[Chunk]:
        """Returns the blocks in which the ranks wrote a tensor, mapped.

        Raises:
            DamagedFileError: naming the file and the byte.
        """
        return [self._chunk(name, part) for part in self._parts(name)]

    def _parts(self, name: str) -> list[ChunkStorageMetadata]:
        metadata = self._metadata.state_dict_metadata[name]
        assert isinstance(metadata, TensorStorageMetadata)
        return metadata.chunks

    def _chunk(self, name: str, part: ChunkStorageMetadata) -> Chunk:
        # Every chunk is an archive of its own within the file.
        place = self._metadata.storage_data[MetadataIndex(name, part.offsets)]
        try:
            archive = map_archive(self._file(place.relative_path), place.offset, place.length)
            (values,) = archive.tensors.values()
            assert tuple(values.shape) == tuple(part.sizes)
        except Exception:  # torch has half a dozen classes for what it cannot read
            raise DamagedFileError(f"{place.relative_path} at byte {place.offset}") from None
        return Chunk(tuple(part.offsets), values)

    def check_sums(self, without: Collection[str] = (), share: Share = ALL) -> None:
        """Compares the tensors, except those `without`, to their stored sums; the rest was compared when it was read.

        Raises:
            DamagedFileError: naming the file and the tensor.
        """
        parts = [(name, part) for name in self.shapes for part in self._parts(name)]
        for name, part in share.of(parts):
            if name in without:
                continue
            place = self._metadata.storage_data[MetadataIndex(name, part.offsets)]
            try:
                check_archive(self._file(place.relative_path), place.offset, place.length, {})
            except DamagedFileError as error:
                raise DamagedFileError(f"{place.relative_path}, {name}: {error}") from None
            self._chunk(name, part)  # torch, too, must be able to read the directory

    def forget(self) -> None:
        """Releases the memory of all pages read through `chunks`."""
        for file in self._files.values():
            file.forget()

    def _file(self, name: str) -> MappedFile:
        if name not in self._files:
            self._files[name] = MappedFile(self._path / name)
        return self._files[name]


def write_error(path: Path, reason: str) -> CheckpointWriteError:
    """Returns the error of a checkpoint at `path` that could not be written, for `reason`."""
    whole = ": the previous checkpoint is whole" if any(path.parent.glob("*.ckpt")) else ""
    return CheckpointWriteError(f"{path} cannot be written ({reason}); free the disk or move run_dir{whole}.")


def failure_reason(error: BaseException, otherwise: str = "cut short: is the disk full?") -> str:
    """Returns the first cause that has a name; `torch.distributed.checkpoint` raises one error for all ranks."""
    if isinstance(error, dcp.CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        error = next((f for f in failures if isinstance(f, OSError)), failures[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return otherwise


def _check_sizes(path: Path, metadata: Metadata) -> None:
    """Refuses a folder in which a file is missing or cut short, before any rank waits for another in a collective."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        if not (path / name).is_file():
            raise DamagedFileError(f"{name} is missing or no file")
        if (path / name).stat().st_size < end:
            raise DamagedFileError(f"{name} is cut short")
