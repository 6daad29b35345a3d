"""Blocks of a tensor on disk with a few rows from memory in their place, for an export that changes them.

Letters: U rows that are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor

from pkm_lightning.checkpoints.folder import Chunk


def with_rows(chunks: Iterable[Chunk], rows_U: Tensor, values: Tensor) -> list[Chunk]:
    """Returns blocks that cover the same tensor, in which rows `rows_U` have other `values`.

    Args:
        chunks: blocks that cover it, of any rows and columns.
        rows_U: numbers of rows, ascending.
        values: of these rows, (U, ...), in the dtype of the tensor.
    """
    numbers = rows_U.tolist()
    columns = (0,) * (values.ndim - 1)
    replaced = [Chunk((row, *columns), values[place : place + 1]) for place, row in enumerate(numbers)]
    parts = []
    for offsets, block in chunks:
        first, end = offsets[0], offsets[0] + len(block)
        bounds = [first - 1, *(row for row in numbers if first <= row < end), end]
        for before, after in pairwise(bounds):
            if before + 1 < after:
                part = block[before + 1 - first : after - first]
                parts.append(Chunk((before + 1, *offsets[1:]), part))
    return parts + replaced
