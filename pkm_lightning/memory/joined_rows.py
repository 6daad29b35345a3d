"""The rows of a table that is stored in several parts, one below the other, each in any file.

Letters: V values per line, U lines to read, Z bytes per line.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.memory.stored_rows import SharedFile, StoredRows

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8


class JoinedRows(StoredRows):
    """The lines of all parts, in their order.

    Args:
        path: what the parts are called in messages: the folder of their files.
        parts: one or more, of one width and dtype.
    """

    def __init__(self, path: Path, parts: Sequence[StoredRows]) -> None:
        lines = sum(part.lines for part in parts)
        super().__init__(path=path, start=0, dtype=parts[0].dtype, lines=lines, width=parts[0].width)
        self.parts = list(parts)
        self._ends = list(accumulate(part.lines for part in parts))

    @property
    def files(self) -> list[SharedFile]:
        """All files of the parts, once each."""
        return list(dict.fromkeys(file for part in self.parts for file in part.files))

    def read_into(self, ids_U: Int64[Tensor, " U"], bytes_UZ: UInt8[Tensor, "U Z"]) -> None:
        """Fills `bytes` with lines of Z bytes, by this thread; otherwise as `StoredRows.read_into`."""
        if bool((ids_U[1:] < ids_U[:-1]).any()):
            order_U = ids_U.argsort()
            ascending_UZ = torch.empty_like(bytes_UZ)
            self.read_into(ids_U[order_U], ascending_UZ)
            bytes_UZ[order_U] = ascending_UZ
            return
        if len(ids_U) and not 0 <= int(ids_U[0]) <= int(ids_U[-1]) < self.lines:
            raise ValueError(f"ids reach from {int(ids_U[0])} to {int(ids_U[-1])}; allowed: 0 to {self.lines - 1}.")
        # In ascending order the ids of a part are neighbours.
        limits = [0, *torch.searchsorted(ids_U, torch.tensor(self._ends)).tolist()]
        for part, end, first, last in zip(self.parts, self._ends, limits[:-1], limits[1:], strict=True):
            if first < last:
                part.read_into(ids_U[first:last] - (end - part.lines), bytes_UZ[first:last])

    def read_bytes(self, start: int, length: int) -> bytes:
        """Returns bytes of the values of all parts; otherwise as `StoredRows.read_bytes`."""
        width, read = self.width * self.dtype.itemsize, []
        while length:
            number = bisect.bisect_right(self._ends, start // width)
            end = self._ends[number] * width
            taken = min(length, end - start)
            read.append(self.parts[number].read_bytes(start - (end - self.parts[number].lines * width), taken))
            start, length = start + taken, length - taken
        return b"".join(read)
