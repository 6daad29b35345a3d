"""Packing: a training row is filled with whole statements in shuffled order until the next one no longer fits.

Next-fit never looks back, so the rows are a function of the shuffle alone. Finding where every possible row would end
is one vectorised search; following those ends from row to row is a short loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from pkm_lightning.data.order import epoch_generator


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Cut a sequence of statements into rows.

    Args:
        lengths: (n,) tokens of each statement in order, each from 1 to `capacity`.
        capacity: tokens a row can hold.

    Returns:
        (rows + 1,) int64; row i holds the statements from entry i up to, not including, entry i + 1.
    """
    n = len(lengths)
    assert n > 0, "there must be statements"
    assert 1 <= lengths.min() <= lengths.max() <= capacity, "lengths must lie in 1..capacity"
    ends = np.cumsum(lengths, dtype=np.int64)
    next_row = np.searchsorted(ends, ends - lengths + capacity, side="right").tolist()
    bounds = [0]
    while bounds[-1] < n:
        bounds.append(next_row[bounds[-1]])
    return np.asarray(bounds, dtype=np.int64)


class PackedRows(Sequence[np.ndarray]):
    """Rows of statement ids: a shuffled list and the bounds of each row in it."""

    def __init__(self, statement_ids: np.ndarray, bounds: np.ndarray) -> None:
        self._statement_ids = statement_ids
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._statement_ids[self._bounds[index] : self._bounds[index + 1]]


def pack_rows(statement_ids: np.ndarray, lengths: np.ndarray, capacity: int | None) -> PackedRows:
    """Rows over `statement_ids` in the order given; without a capacity every statement is a row of its own.

    Args:
        statement_ids: (n,) ids into the statement store.
        lengths: (statements,) tokens of every statement of the store.
        capacity: tokens a row can hold, or None.
    """
    if capacity is None:
        return PackedRows(statement_ids, np.arange(len(statement_ids) + 1))
    return PackedRows(statement_ids, next_fit(lengths[statement_ids], capacity))


class PackedOrder:
    """The epochs of a list of statements (an entry per exposure): shuffled, then packed.

    Args:
        statement_ids: (exposures,) what one epoch shows.
        lengths: (statements,) tokens of every statement of the store.
        capacity: tokens a row can hold, or None for one statement a row.
        seed: together with the epoch it decides the order.
    """

    def __init__(self, statement_ids: np.ndarray, lengths: np.ndarray, *, capacity: int | None, seed: int) -> None:
        self._statement_ids = statement_ids
        self._lengths = lengths
        self._capacity = capacity
        self._seed = seed
        self._latest: tuple[int, PackedRows] | None = None

    def size(self, epoch: int) -> int:
        """Rows of this epoch; the shuffle makes it vary a little when statements are packed."""
        return len(self._statement_ids) if self._capacity is None else len(self.rows(epoch))

    def rows(self, epoch: int) -> PackedRows:
        """The rows of this epoch in training order."""
        if self._latest is None or self._latest[0] != epoch:
            shuffled = epoch_generator(self._seed, epoch).permutation(self._statement_ids)
            self._latest = (epoch, pack_rows(shuffled, self._lengths, self._capacity))
        return self._latest[1]
