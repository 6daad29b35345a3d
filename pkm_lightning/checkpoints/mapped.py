"""Maps tensors of a file into memory: the system reads a page when it is used and drops it when memory is short.

The mappings are read-only. Torch's own (`torch.load(mmap=True)`, `UntypedStorage.from_file`) can be written to, so
Linux counts them as memory in use and refuses a file that is larger than the memory. The price: a write to a mapped
tensor ends the process with a segmentation fault, so these tensors serve for reading weights, never for training. A
file that is shortened while it is mapped ends the process as well.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from pkm_lightning.checkpoints.inert import check_pickle
from pkm_lightning.checkpoints.tree import check_extent, flatten
from pkm_lightning.storage import open_regular

_ZIP = b"PK\x03\x04"


class DamagedFileError(ValueError):
    """A file whose bytes do not fit its own header; the message is the reason without the path."""


class MappedFile:
    """A file mapped read-only into memory. Tensors made from it keep it open.

    Raises:
        OSError, ValueError: it cannot be opened, or is empty.
    """

    def __init__(self, path: str | Path) -> None:
        with open_regular(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, length: int) -> bytes:
        """Returns a copy of up to `length` bytes, fewer at the end of the file."""
        return self._map[start : start + length]

    def view(self, start: int, length: int) -> memoryview:
        """Returns up to `length` bytes without copying them; release it before long."""
        return memoryview(self._map)[start : start + length]

    def tensor(
        self, start: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the tensor of `shape` whose first value lies at byte `start`, without reading it.

        Args:
            start: in bytes.
            dtype, shape: of the tensor.
            stride: in values; None for a contiguous tensor.

        Raises:
            ValueError: the tensor would reach beyond the end of the file.
        """
        if stride is None:
            stride = torch.empty(tuple(shape), device="meta").stride()
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if start < 0 or start + count * dtype.itemsize > len(self):
            raise ValueError(f"bytes {start} to {start + count * dtype.itemsize} of a file of {len(self)}.")
        with warnings.catch_warnings():
            # Torch has no read-only tensors and warns of a buffer that is one.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        return flat.as_strided(tuple(shape), tuple(stride))

    def forget(self) -> None:
        """Releases the memory of all pages read so far; a page is read again when it is used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def expect_scattered_reads(tensor: Tensor) -> None:
    """Advises the system to read single pages of a mapped tensor, without the neighbours that it reads by default.

    Scattered rows of a table come from a cold disk several times as fast this way; see scripts/bench_mmap.py.
    """
    if not hasattr(mmap, "MADV_RANDOM") or not tensor.numel():
        return
    # The tensor does not know its mapping, and Python's mmap object advises only on the whole of its own.
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.untyped_storage().nbytes()
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_RANDOM)


class MappedArchive(NamedTuple):
    """What `torch.save` wrote: the skeleton, the mapped tensors by name, and the first byte of each one's record.

    `pkm_lightning.checkpoints.tree` explains skeleton and names.
    """

    skeleton: Any
    tensors: dict[str, Tensor]
    records: dict[str, int]


def map_archive(file: MappedFile, start: int = 0, length: int | None = None) -> MappedArchive:
    """Maps what `torch.save` wrote into `length` bytes of `file` from `start` on.

    Raises:
        Exception: torch's, of half a dozen classes, for bytes that it cannot read.
    """
    # Loaded to the meta device, a tensor carries the offset of its values in the archive, and no value is read.
    content = load_archive(file, start, length, map_location="meta")
    skeleton, tensors = flatten(content)
    records = {name: start + _offset(tensor) for name, tensor in tensors.items()}
    return MappedArchive(skeleton, {n: _mapped(file, records[n], tensor) for n, tensor in tensors.items()}, records)


def load_archive(file: MappedFile, start: int = 0, length: int | None = None, **options: Any) -> Any:
    """Returns what `torch.save` wrote into `length` bytes of `file` from `start` on; `options` are of `torch.load`.

    Raises:
        Exception: torch's, of half a dozen classes, for bytes that it cannot read.
        ValueError: no zip archive, or content that takes forever to read.
    """
    part = cast("IO[bytes]", FilePart(file, start, len(file) - start if length is None else length))
    # Torch goes by these bytes: what does not start with them it would unpickle as a file of before version 1.6.
    if file.read(start, len(_ZIP)) != _ZIP:
        raise ValueError("it is no archive.")
    # By torch's own reader, for another one may find another record under the name.
    check_pickle(torch._C.PyTorchFileReader(part).get_record("data.pkl"))
    part.seek(0)
    content = torch.load(part, weights_only=True, **options)
    check_extent(content)
    return content


def _offset(tensor: Tensor) -> int:
    offset = tensor.untyped_storage()._checkpoint_offset
    if offset is None:
        raise ValueError("the archive does not record where its values lie.")
    return offset


def _mapped(file: MappedFile, record: int, tensor: Tensor) -> Tensor:
    first = record + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return file.tensor(first, tensor.dtype, tensor.shape, tensor.stride())


class FilePart(io.RawIOBase):
    """Bytes `start` to `start + length` of a mapped file as a file object, which is what `torch.load` takes."""

    def __init__(self, file: MappedFile, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(self._start + self._at, min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
