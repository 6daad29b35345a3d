"""The rows that a value table has at first: drawn at random, or copied from a file; each rank holds its part.

Letters: N lines, V values per line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from pkm_lightning.memory.mesh import TableMesh
    from pkm_lightning.memory.stored_rows import StoredRows


class FilledTable(Protocol):
    """The parts of a `ValueTable`, which itself imports this module."""

    weight: nn.Parameter
    dim: int
    slices: int
    std: float
    mesh: TableMesh | None

    @property
    def n_lines(self) -> int:
        """Number of lines of the whole table."""

    @property
    def is_split(self) -> bool:
        """Whether each rank holds a part."""


@torch.no_grad()
def draw_rows(table: FilledTable) -> None:
    """Draws the rows from N(0, std**2), the same table for every sharding; does nothing on meta.

    Every rank draws the whole table block by block, so that it never holds more than its part and one block.
    """
    weight, width = table.weight, table.dim // table.slices
    if weight.is_meta:
        return
    low, high, columns = _own_part(table)
    for start, length in _blocks(table.n_lines, width):
        if not table.is_split:
            nn.init.normal_(weight[start : start + length], std=table.std)
            continue
        block = torch.empty(length, width, dtype=weight.dtype, device=weight.device)
        nn.init.normal_(block, std=table.std)
        first, last = max(start, low), min(start + length, high)
        if first < last:
            weight[first - low : last - low] = block[first - start : last - start, columns]


@torch.no_grad()
def copy_rows(table: FilledTable, stored: StoredRows) -> None:
    """Copies this rank's part of the rows in a file, block by block, in the dtype of the table; does nothing on meta.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if table.weight.is_meta:
        return
    low, high, columns = _own_part(table)
    for start, length in _blocks(high - low, table.dim // table.slices):
        table.weight[start : start + length] = stored.block(low + start, length)[:, columns]


def _own_part(table: FilledTable) -> tuple[int, int, slice]:
    """Returns the first line of this rank, the one past its last, and its columns."""
    width = table.dim // table.slices
    if table.mesh is None:
        return 0, table.n_lines, slice(0, width)
    return *table.mesh.row_range(table.n_lines), table.mesh.columns(width)


def _blocks(lines: int, width: int) -> Iterator[tuple[int, int]]:
    """Yields start and length of blocks of about 2**22 values.

    Their draws in sequence equal, on the CPU, one draw of the whole table.
    """
    # torch draws normal values on the CPU in groups of 16 and treats the last 16 of a tensor differently: blocks are
    # multiples of 16 lines, and the last block takes the rest.
    block = max(16, 2**22 // width // 16 * 16)
    for start in range(0, lines, block):
        if lines - start < 2 * block:
            yield start, lines - start
            return
        yield start, block
