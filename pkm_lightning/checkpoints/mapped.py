"""Tensors that stay in their files: pages come when they are read, and go when memory is wanted for something else.

The mappings are read-only. torch's own (`torch.load(mmap=True)`, `UntypedStorage.from_file`) can be written to, which
Linux counts against memory: it refuses a file larger than that. The price: a write to one of these tensors ends the
process, so they are for reading weights, never for training; so does a file that is cut short while it is read.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from pkm_lightning.checkpoints.sharded import flatten, restore


class MappedFile:
    """A file as memory. Tensors made from it keep it open.

    Raises:
        OSError, ValueError: it cannot be opened, or is empty.
    """

    def __init__(self, path: str | Path) -> None:
        with Path(path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, length: int) -> bytes:
        """A copy of some bytes, fewer at the end."""
        return self._map[start : start + length]

    def tensor(
        self, start: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """The tensor of `shape` whose first value lies at byte `start`; `stride` in values, None: contiguous.

        Raises:
            ValueError: it would reach beyond the file.
        """
        if stride is None:
            stride = torch.empty(tuple(shape), device="meta").stride()
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if start < 0 or start + count * dtype.itemsize > len(self):
            raise ValueError(f"bytes {start} to {start + count * dtype.itemsize} of a file of {len(self)}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        return flat.as_strided(tuple(shape), tuple(stride))

    def forget(self) -> None:
        """Gives back the memory of all pages read so far; they come again when they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def expect_scattered_reads(tensor: Tensor) -> None:
    """Tells the system to fetch pages of a mapped tensor without their neighbours, which nobody will want.

    Rows read here and there come from a cold disk several times as fast so; see scripts/bench_mmap.py.
    """
    if not hasattr(mmap, "MADV_RANDOM") or not tensor.numel():
        return
    # The tensor does not know its mapping, and Python's mmap gives advice on none but its own.
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.untyped_storage().nbytes()
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_RANDOM)


def map_archive(file: MappedFile, start: int = 0, length: int | None = None) -> Any:
    """What `torch.save` wrote into `length` bytes of `file` from `start` on, its tensors mapped.

    Raises:
        Exception: of half a dozen kinds, torch's, for what it cannot read.
    """
    part = _Part(file, start, len(file) - start if length is None else length)
    # Tensors on meta come with the place of their values in the archive, which is not read.
    skeleton, tensors = flatten(torch.load(cast("IO[bytes]", part), map_location="meta", weights_only=True))
    mapped = {name: _mapped(file, start, tensor) for name, tensor in tensors.items()}
    return restore(skeleton, mapped)


def _mapped(file: MappedFile, start: int, tensor: Tensor) -> Tensor:
    place = tensor.untyped_storage()._checkpoint_offset
    if place is None:
        raise ValueError("the archive does not say where its values lie.")
    first = start + place + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return file.tensor(first, tensor.dtype, tensor.shape, tensor.stride())


class _Part(io.RawIOBase):
    """Bytes `start` to `start + length` of a mapped file as a file of their own."""

    def __init__(self, file: MappedFile, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._file.read(self._start + self._at, min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
