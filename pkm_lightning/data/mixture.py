"""Several sources in given shares: which of them each position takes from is computed from the position alone.

Positions come in blocks. In every block each source has the same number of places, its share by largest remainder, and
the seed and the number of the block shuffle them. So the sequences that a source has given before a position are known
without counting, and each source goes through its own epochs, whatever the others do.

Letters: S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.data.batch import SequenceSource
from pkm_lightning.data.order import Order, Timeline
from pkm_lightning.data.permutation import Permutation

__all__ = ["BLOCK", "MixedKeys", "MixedOrder", "MixedSequences", "places_per_block"]

#: Sequences after which every source has exactly its share.
BLOCK = 1000

#: Number of the source, and the key of the sequence there.
MixedKey: TypeAlias = tuple[int, Any]


def places_per_block(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Returns how many of `block` sequences each source gives: its share, rounded so that they sum up to `block`.

    Args:
        weights: positive; only their ratios count.
        block: sequences to share out.
    """
    exact_S = np.asarray(weights, dtype=np.float64) / np.sum(weights) * block
    places_S = np.floor(exact_S).astype(np.int64)
    # Those that rounding down takes most from get the rest, the first one among equals.
    short = np.argsort(places_S - exact_S, kind="stable")[: block - int(places_S.sum())]
    places_S[short] += 1
    places: list[int] = places_S.tolist()
    return places


class MixedOrder:
    """One endless section, since the epochs of the sources end at different positions.

    Args:
        orders: of the sources.
        places: sequences of each source per block, as `places_per_block` returns them.
        seed: decides their arrangement.
    """

    sections = 1

    def __init__(self, orders: Sequence[Order], places: Sequence[int], seed: int) -> None:
        self._orders, self._places, self._seed = orders, places, seed

    def size(self, section: int) -> int:
        """Returns a number that no training reaches."""
        return 2**62

    def keys(self, section: int) -> MixedKeys:
        """Returns the keys of all positions."""
        return MixedKeys(self._orders, self._places, self._seed)


class MixedKeys(Sequence[MixedKey]):
    """The keys of all positions, each computed when it is asked for; see `MixedOrder`."""

    def __init__(self, orders: Sequence[Order], places: Sequence[int], seed: int) -> None:
        self._timelines = [Timeline(order) for order in orders]
        self._places, self._seed, self._block = places, seed, sum(places)
        # Of each place before the shuffle.
        self._source = np.repeat(np.arange(len(places)), places)
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return 2**62

    @overload
    def __getitem__(self, index: int) -> MixedKey: ...

    @overload
    def __getitem__(self, index: slice) -> list[MixedKey]: ...

    def __getitem__(self, index: int | slice) -> MixedKey | list[MixedKey]:
        if isinstance(index, int):
            return self[index : index + 1][0]
        keys: list[MixedKey] = []
        begin, stop, _ = index.indices(len(self))
        while begin < stop:
            block, place = divmod(begin, self._block)
            end = min(place + stop - begin, self._block)
            keys += self._of_block(block, place, end)
            begin += end - place
        return keys

    def _of_block(self, block: int, begin: int, end: int) -> list[MixedKey]:
        arranged = self._arrangement(block)
        given: dict[int, list[Any]] = {}
        for source in np.unique(arranged[begin:end]).tolist():
            earlier = np.count_nonzero(arranged[:begin] == source)
            here = np.count_nonzero(arranged[begin:end] == source)
            position = block * self._places[source] + earlier
            given[source] = self._timelines[source].keys(position, here)[::-1]
        return [(source, given[source].pop()) for source in arranged[begin:end].tolist()]

    def _arrangement(self, block: int) -> np.ndarray:
        """Returns the source at each place of a block."""
        if self._latest is None or self._latest[0] != block:
            places = Permutation(self._block, self._seed, block).at(np.arange(self._block))
            self._latest = (block, self._source[places])
        return self._latest[1]


class MixedSequences:
    """Source of batches whose sequences come from several sources; a key is the number of the source and its key.

    Args:
        sources: each with the same pad id; widths may differ from batch to batch.
        pad_id: the token at padded positions.
    """

    def __init__(self, sources: Sequence[SequenceSource], pad_id: int) -> None:
        self._sources, self._pad_id = sources, pad_id

    def __getitems__(self, keys: list[MixedKey]) -> Batch:
        """Returns the sequences in the order of their keys, as wide as the widest."""
        if not keys:
            return self._sources[0].__getitems__([])
        rows: dict[int, list[int]] = {}
        for row, (source, _) in enumerate(keys):
            rows.setdefault(source, []).append(row)
        parts = {source: self._sources[source].__getitems__([keys[row][1] for row in rows[source]]) for source in rows}
        width = max(part["input_ids"].shape[1] for part in parts.values())
        padding: Mapping[str, Any] = {
            "input_ids": self._pad_id, "labels": NO_TARGET, "doc_ids": -1, "valid": False,
        }  # fmt: skip
        batch = {
            name: torch.full((len(keys), width), value, dtype=parts[keys[0][0]][name].dtype)
            for name, value in padding.items()
        }
        for source, part in parts.items():
            for name, values_BT in part.items():
                batch[name][rows[source], : values_BT.shape[1]] = values_BT
        return batch
