"""Packing: a training sequence is filled with whole statements in shuffled order until the next one does not fit.

A statement is a document, or a piece of one that is too long for a sequence.

Next-fit never looks back, so the sequences are a function of the shuffle alone. One vectorised search finds where every
possible sequence would end; a short loop follows those ends from sequence to sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from pkm_lightning.data.order import epoch_generator
from pkm_lightning.data.permutation import Permutation

#: Pieces that are laid out at a time: 20 MB, and a few tenths of a second.
BLOCK = 2**20


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Cuts a list of statements into sequences.

    Args:
        lengths: (n,) tokens of each statement in order, each from 1 to `capacity`.
        capacity: tokens that a sequence can hold.

    Returns:
        (sequences + 1,) int64; sequence i holds the statements from entry i up to, not including, entry i + 1.
    """
    n = len(lengths)
    assert n > 0, "there must be statements"
    assert 1 <= lengths.min() <= lengths.max() <= capacity, "lengths must lie in 1..capacity"
    ends = np.cumsum(lengths, dtype=np.int64)
    # For a sequence that would begin at each statement: the first statement that would no longer fit.
    next_begin = np.searchsorted(ends, ends - lengths + capacity, side="right").tolist()
    bounds = [0]
    while bounds[-1] < n:
        bounds.append(next_begin[bounds[-1]])
    return np.asarray(bounds, dtype=np.int64)


class PackedKeys(Sequence[np.ndarray]):
    """Keys of packed sequences: a shuffled list of statement ids and the bounds of each sequence in it."""

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


def pack(statement_ids: np.ndarray, lengths: np.ndarray, capacity: int | None) -> PackedKeys:
    """Packs `statement_ids` in the order given.

    Args:
        statement_ids: (n,) ids into the statement store.
        lengths: (statements,) tokens of every statement of the store.
        capacity: tokens that a sequence can hold; None makes every statement a sequence.
    """
    if capacity is None:
        return PackedKeys(statement_ids, np.arange(len(statement_ids) + 1))
    return PackedKeys(statement_ids, next_fit(lengths[statement_ids], capacity))


class PackedOrder:
    """The epochs of a list of statements (one entry per exposure): shuffled, then packed.

    Args:
        statement_ids: (exposures,) what one epoch shows.
        lengths: (statements,) tokens of every statement of the store.
        capacity: tokens that a sequence can hold, or None for one statement per sequence.
        seed: together with the epoch it decides the order.
    """

    sections = 1

    def __init__(self, statement_ids: np.ndarray, lengths: np.ndarray, *, capacity: int | None, seed: int) -> None:
        self._statement_ids = statement_ids
        self._lengths = lengths
        self._capacity = capacity
        self._seed = seed
        self._latest: tuple[int, PackedKeys] | None = None

    def size(self, epoch: int) -> int:
        """Returns the number of sequences; the shuffle makes it vary a little when statements are packed."""
        return len(self._statement_ids) if self._capacity is None else len(self.keys(epoch))

    def keys(self, epoch: int) -> PackedKeys:
        """Returns the keys of this epoch in training order."""
        # `size` and then `keys` are called for the same epoch; packing a large one takes half a second.
        if self._latest is None or self._latest[0] != epoch:
            shuffled = epoch_generator(self._seed, epoch).permutation(self._statement_ids)
            self._latest = (epoch, pack(shuffled, self._lengths, self._capacity))
        return self._latest[1]


class PieceOrder:
    """The pieces of a part of any size: shuffled as a whole in every epoch, then packed block by block.

    A section is a block of at most `BLOCK` pieces of the shuffled list, which alone is held in memory.

    Args:
        lengths: (pieces,) tokens of each piece; may be a mapped file.
        capacity: tokens that a sequence can hold, or None for one piece per sequence.
        seed: together with the epoch it decides the order.
        block: pieces per section.
    """

    def __init__(self, lengths: np.ndarray, *, capacity: int | None, seed: int, block: int = BLOCK) -> None:
        self._lengths, self._capacity, self._seed, self._block = lengths, capacity, seed, block
        self.sections = -(-len(lengths) // block)
        self._latest: tuple[int, PackedKeys] | None = None

    def size(self, section: int) -> int:
        """Returns the number of sequences of a block."""
        return len(self.keys(section))

    def keys(self, section: int) -> PackedKeys:
        """Returns the keys of a block, arrays of piece numbers, in training order."""
        # `size` and then `keys` are called for the same section.
        if self._latest is None or self._latest[0] != section:
            epoch, block = divmod(section, self.sections)
            places = np.arange(block * self._block, min((block + 1) * self._block, len(self._lengths)))
            pieces = Permutation(len(self._lengths), self._seed, epoch).at(places)
            self._latest = (section, pack(pieces, self._lengths, self._capacity))
        return self._latest[1]
