"""Reads `.metadata` of a checkpoint folder, a pickle, without running what it names.

`torch.distributed.checkpoint` writes the file by `pickle.dump` and reads it by `pickle.load`, which calls any function
that a file names. Here every name must be one of those that torch writes; names, shapes, dtypes and places are taken
out, checked against each other, and the objects that torch needs are made anew from them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pkm_lightning.checkpoints.inert import InertUnpickler, Record
from pkm_lightning.checkpoints.mapped import DamagedFileError
from pkm_lightning.checkpoints.sums import unsealed
from pkm_lightning.storage import open_regular

NAME = ".metadata"
_MOST_DIMS = 64  # what PyTorch supports
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
    "pathlib._local": ("Path", "PosixPath"),
}  # fmt: skip


class Place(NamedTuple):
    """The bytes of one chunk, an archive of its own, in a file of the folder."""

    relative_path: str
    offset: int
    length: int
    #: Of torch's compressed streams, which this package does not write.
    transform_descriptors: None = None


class MetadataReader(dcp.FileSystemReader):
    """Torch's reader of a folder with metadata that were read by `read_metadata`, once."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Returns the metadata given; torch's own method would unpickle the file."""
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Returns the metadata of a folder; `storage_data` maps each chunk to its `Place`.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it names code, describes chunks that do not make up their tensors or that lie outside the
            folder, or has changed since it was written.
    """
    with open_regular(folder / NAME, "rb") as metadata:
        content = unsealed(metadata.read(), NAME)
    file = io.BytesIO(content)
    try:
        root = _Unpickler(file).load()
    except DamagedFileError:
        raise
    except Exception:  # bytes that are no pickle raise errors of a dozen classes
        raise DamagedFileError(f"{NAME} is unreadable") from None
    if file.tell() != len(content):
        raise DamagedFileError(f"{NAME} has {len(content) - file.tell()} bytes too many")
    try:
        return _metadata(root)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{NAME} is inconsistent" + (f": {error}" if str(error) else "")) from None


class _Unpickler(InertUnpickler):
    """An unpickler of those names only that torch writes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return _size
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if name not in _RECORDS.get(module, ()):
            raise DamagedFileError(f"{NAME} names {module}.{name}, code that no checkpoint needs and that was not run")
        return super().find_class(module, name)


def _size(sizes: Any) -> tuple[int, ...]:
    # tuple() would make a list, or the letters of a text, anew at every mention.
    if not isinstance(sizes, tuple):
        raise TypeError("a shape is no tuple")
    return sizes


def _metadata(root: Any) -> Metadata:
    """Returns torch's object with the content of the record `root`.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: the record has another structure, or contradicts itself.
    """
    places = {}
    for index, info in _state(root, "Metadata")["storage_data"].items():
        key = _state(index, "MetadataIndex")
        places[MetadataIndex(_text(key["fqn"]), _sizes(key["offset"]))] = _place(_state(info, "_StorageInfo"))
    tensors: dict[str, TensorStorageMetadata] = {}
    lists = set()
    for name, record in _state(root, "Metadata")["state_dict_metadata"].items():
        entry = _state(record, "TensorStorageMetadata")
        dtype = _state(entry["properties"], "TensorProperties")[0]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{_text(name)!r} has no dtype")
        # One long list for many tensors would be read for each of them.
        if id(entry["chunks"]) in lists:
            raise ValueError(f"{_text(name)!r} shares its chunks with another tensor")
        lists.add(id(entry["chunks"]))
        chunks = [_chunk(_state(chunk, "ChunkStorageMetadata")) for chunk in entry["chunks"]]
        tensors[_text(name)] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(_sizes(entry["size"])), chunks
        )
        _check_chunks(name, tensors[name], places)
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _state(record: Any, kind: str) -> Any:
    if not isinstance(record, Record) or type(record).__name__ != kind:
        raise TypeError(f"a {type(record).__name__} stands in the place of a {kind}")
    return record.state


def _chunk(state: Mapping[str, Any]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(_sizes(state["offsets"])), torch.Size(_sizes(state["sizes"])))


def _sizes(value: Any) -> tuple[int, ...]:
    # The value is not shown: nested tuples may take forever to print.
    if not isinstance(value, tuple) or len(value) > _MOST_DIMS:
        raise ValueError(f"a {type(value).__name__} is no shape")
    if not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError(
            "a size, an offset or a length is no number of values or bytes: what they describe is no shape"
        )
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} stands in the place of a name")
    return value


def _place(state: Mapping[str, Any]) -> Place:
    place = Place(_text(state["relative_path"]), state["offset"], state["length"])
    _sizes(place[1:3])
    # Torch would follow a path out of the folder.
    if Path(place.relative_path).name != place.relative_path:
        raise ValueError(f"{place.relative_path!r} is no file of the folder")
    if state.get("transform_descriptors"):
        raise ValueError(f"{place.relative_path} is compressed")
    return place


def _check_chunks(name: str, tensor: TensorStorageMetadata, places: Mapping[MetadataIndex, Place]) -> None:
    """Refuses chunks that leave a part of their tensor undefined, reach beyond it, or have too few bytes."""
    for chunk in tensor.chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, tensor.size, strict=True)):
            raise ValueError(f"a chunk of {name} reaches beyond it")
        if (
            places[MetadataIndex(name, chunk.offsets)].length
            < math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
        ):
            raise ValueError(f"a chunk of {name} is shorter than its shape")
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
        raise ValueError(f"the chunks of {name} do not make up its shape")
