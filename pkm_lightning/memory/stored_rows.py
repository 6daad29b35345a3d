"""The rows of a table in a file of any size, of which the few that a micro-batch reads are copied into memory.

Rows are read, not mapped: `pkm_lightning.ops.file_rows` has the reasons.

Letters: N lines, V values per line, U lines to read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkm_lightning.errors import CheckpointError
from pkm_lightning.ops.file_rows import read_file_rows
from pkm_lightning.storage import open_regular

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

#: Requests to the disk under way at a time, and the rows that are worth a thread.
_MOST_THREADS, _ROWS_PER_THREAD = 8, 512
#: The digest covers so many pages, evenly spaced; all of a table that has no more.
_DIGEST_PAGES, _PAGE = 256, 4096
# Two threads that open a file each would leave one with a descriptor that the other has closed.
_opening = threading.Lock()


class SharedFile:
    """A file that is opened at the first read, once for all that read in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def descriptor(self) -> int:
        """Returns its number among the open files of the process.

        Raises:
            OSError: it cannot be opened.
        """
        with _opening:
            if self._file is None:
                self._file = open_regular(self.path, "rb")
                if hasattr(os, "posix_fadvise"):
                    # Scattered rows: the neighbours, which the system reads by default, would be read for nothing.
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return self._file.fileno()

    def stamp(self) -> tuple[int, int]:
        """Returns what changes when somebody writes to the file: its bytes and the time of the last write.

        Raises:
            OSError: it cannot be opened.
        """
        state = os.fstat(self.descriptor())
        return state.st_size, state.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class StoredRows:
    """The lines of a table in a file, which is opened at the first read.

    Args:
        path: of the file.
        start: byte of the first value.
        dtype: of the values.
        lines, width: shape of the table, N and V.
        file: the file, where others read in it too.
    """

    def __init__(
        self,
        *,
        path: Path,
        start: int,
        dtype: torch.dtype,
        lines: int,
        width: int,
        file: SharedFile | None = None,
    ) -> None:
        self.path, self.start, self.dtype, self.lines, self.width = path, start, dtype, lines, width
        self._file = SharedFile(path) if file is None else file
        self._stamps: list[tuple[int, int]] | None = None

    @property
    def files(self) -> list[SharedFile]:
        """All files of the rows."""
        return [self._file]

    def read(self, ids_U: Int64[Tensor, " U"], *, pinned: bool = False) -> Float[Tensor, "U V"]:
        """Returns lines in the dtype of the file, by several threads where there are many.

        Args:
            ids_U: on the CPU, best in ascending order.
            pinned: in page-locked memory, from which a GPU copies without waiting.

        Raises:
            ValueError: an id is out of range.
            CheckpointError: the file cannot be read, has become shorter, or holds other rows than at first.
        """
        out_UV = torch.empty(len(ids_U), self.width, dtype=self.dtype, pin_memory=pinned)
        bytes_UZ = out_UV.view(torch.uint8)
        threads = min(_MOST_THREADS, len(ids_U) // _ROWS_PER_THREAD)
        try:
            if threads < 2:
                self.read_into(ids_U, bytes_UZ)
            else:
                parts = zip(ids_U.tensor_split(threads), bytes_UZ.tensor_split(threads), strict=True)
                # Threads of this call alone: 0.1 ms, and none is left when a run ends or fails.
                with ThreadPoolExecutor(threads, thread_name_prefix="table-rows") as pool:
                    list(pool.map(lambda part: self.read_into(*part), parts))
            self._check_unchanged()
        except (OSError, EOFError) as error:
            raise self.failure(error) from error
        return out_UV

    def block(self, first: int, count: int) -> Float[Tensor, "U V"]:
        """Returns lines `first` to `first + count` in the dtype of the file.

        Raises:
            CheckpointError: as `read`.
        """
        width = self.width * self.dtype.itemsize
        try:
            content = bytearray(self.read_bytes(first * width, count * width))
            self._check_unchanged()
        except (OSError, EOFError) as error:
            raise self.failure(error) from error
        return torch.frombuffer(content, dtype=self.dtype).view(count, self.width)

    @functools.cached_property
    def digest(self) -> Int64[Tensor, " 6"]:
        """N and V, and a SHA-256 of dtype, shape and up to 256 pages of the values, evenly spaced, as four numbers.

        Raises:
            CheckpointError: as `read`.
        """
        try:
            self._stamps = [file.stamp() for file in self.files]
            return self._present_digest()
        except (OSError, EOFError) as error:
            raise self.failure(error) from error

    def _present_digest(self) -> Int64[Tensor, " 6"]:
        total = self.lines * self.width * self.dtype.itemsize
        pages = math.ceil(total / _PAGE)
        chosen = min(pages, _DIGEST_PAGES)
        made = hashlib.sha256(f"{self.dtype} {self.lines} {self.width}".encode())
        for number in range(chosen):
            # The first and the last page are among them.
            page = number * (pages - 1) // max(1, chosen - 1)
            made.update(self.read_bytes(page * _PAGE, min(_PAGE, total - page * _PAGE)))
        return torch.tensor((self.lines, self.width, *struct.unpack("<4q", made.digest())), device="cpu")

    def _check_unchanged(self) -> None:
        """Refuses a file to which somebody has written other rows since the digest was computed.

        Raises:
            OSError, EOFError: saying so, or as `read_bytes`.
        """
        digest, stamps = self.digest, [file.stamp() for file in self.files]
        if stamps != self._stamps:
            if not torch.equal(self._present_digest(), digest):
                raise EOFError("it holds other rows than at first")
            self._stamps = stamps

    def read_into(self, ids_U: Int64[Tensor, " U"], bytes_UZ: UInt8[Tensor, "U Z"]) -> None:
        """Fills `bytes` with lines of Z bytes, by this thread.

        Raises:
            ValueError: an id is out of range.
            OSError, EOFError: as `read_bytes`.
        """
        read_file_rows(self._file.descriptor(), self.start, self.lines, ids_U, bytes_UZ)

    def read_bytes(self, start: int, length: int) -> bytes:
        """Returns bytes of the values; `start` counts from the first value.

        Raises:
            OSError, EOFError: the file cannot be read, or has become shorter.
        """
        parts, start = [], self.start + start
        while length:
            part = os.pread(self._file.descriptor(), length, start)  # Linux returns 2 GiB at most
            if not part:
                raise EOFError("it has become shorter")
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)

    def failure(self, error: Exception) -> CheckpointError:
        """Returns the error that names the file and what went wrong."""
        reason = getattr(error, "strerror", None) or str(error)
        return CheckpointError(
            f"table.path={self.path} cannot be read ({reason}); it holds the rows of a table: put it back."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredRows:
        return self
