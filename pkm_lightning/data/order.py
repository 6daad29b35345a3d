"""Data order as a pure function: a position counts the sequences that all ranks together have consumed.

Everything else follows: a rank's micro-batch is a slice at a position, a resumed run starts at a position, and the
number of ranks, micro-batches or workers cannot change the data of one optimizer step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from pkm_lightning.data.permutation import Permutation
from pkm_lightning.errors import ConfigError


class Order(Protocol):
    """Sequences in training order, in sections: epochs, or blocks of an epoch that is too large to be laid out at once.

    Both methods depend on the seed and the number of the section alone; there is no last section.

    Attributes:
        sections: of an epoch.
    """

    sections: int

    def size(self, section: int) -> int:
        """Returns the number of sequences of this section, at least 1."""

    def keys(self, section: int) -> Sequence[Any]:
        """Returns the keys of this section's sequences in training order."""


class ShuffledOrder:
    """Keys 0..n-1, shuffled anew in every epoch; n may be any number, since no list of them is made."""

    sections = 1

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._seed = seed

    def size(self, epoch: int) -> int:
        """Returns n, for every epoch."""
        return self._n

    def keys(self, epoch: int) -> Permutation:
        """Returns the permutation of this epoch."""
        return Permutation(self._n, self._seed, epoch)


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Returns the random generator of one epoch."""
    # PCG64 by name: the bit generator that `default_rng` stands for may change with the version of NumPy.
    return np.random.Generator(np.random.PCG64([seed, epoch]))


class Timeline:
    """All sections of an order laid end to end, addressed by global position.

    Sections may differ in size (packing), so their starts are summed up as they are first needed.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._starts = [0]
        self._section = -1
        self._keys: Sequence[Any] = ()

    def keys(self, position: int, count: int) -> list[Any]:
        """Returns the `count` keys from `position` on, across sections where needed."""
        keys: list[Any] = []
        while len(keys) < count:
            section = self._find_section(position + len(keys))
            if section != self._section:
                self._keys, self._section = self._order.keys(section), section
            begin = position + len(keys) - self._starts[section]
            keys.extend(self._keys[begin : begin + count - len(keys)])
        return keys

    def _find_section(self, position: int) -> int:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + self._order.size(len(self._starts) - 1))
        return bisect_right(self._starts, position) - 1


class StepBatchSampler:
    """Endless micro-batches of one rank: at position p, rank r of W takes the b sequences from p + r * b on.

    Args:
        order: the sequences.
        start: returns the global position; called whenever an iteration begins.
        rank: this rank, 0 to `world_size` - 1.
        world_size: number of ranks that read different data.
        micro_batch: b, sequences per rank and micro-batch.
    """

    def __init__(self, order: Order, start: Callable[[], int], *, rank: int, world_size: int, micro_batch: int) -> None:
        self._timeline = Timeline(order)
        self._start = start
        self._offset = rank * micro_batch
        self._stride = world_size * micro_batch
        self._micro_batch = micro_batch

    def __iter__(self) -> Iterator[list[Any]]:
        # Called here and not in the generator, whose body would run only after training has moved on.
        return self._batches(self._start())

    def _batches(self, position: int) -> Iterator[list[Any]]:
        while True:
            yield self._timeline.keys(position + self._offset, self._micro_batch)
            position += self._stride


class ShareBatchSampler:
    """One finite pass: rank r of W takes the keys r, r + W, ...; every rank makes the same number of batches.

    A rank without keys left yields empty batches, which the source turns into batches without targets.
    """

    def __init__(self, keys: Sequence[Any], *, rank: int, world_size: int, batch_size: int) -> None:
        # Interleaved shares differ by one key at most; divisions below round up.
        self._keys, self._share = keys, range(rank, len(keys), world_size)
        self._batch_size = batch_size
        largest_share = -(-len(keys) // world_size)
        self._n_batches = -(-largest_share // batch_size)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[list[Any]]:
        for i in range(self._n_batches):
            yield [self._keys[place] for place in self._share[i * self._batch_size : (i + 1) * self._batch_size]]


def micro_batch_size(global_batch_size: int, world_size: int, accumulate: int) -> int:
    """Returns the sequences per rank and micro-batch.

    Raises:
        ConfigError: if the global batch does not divide evenly; names the nearest size that would.
    """
    parts = world_size * accumulate
    if global_batch_size % parts == 0:
        return global_batch_size // parts
    closest = max(parts, round(global_batch_size / parts) * parts)
    raise ConfigError(
        f"data.global_batch_size={global_batch_size} does not divide over {world_size} ranks (trainer.devices x "
        f"trainer.num_nodes) x trainer.accumulate_grad_batches={accumulate}; it must be a multiple of {parts}: "
        f"the nearest is data.global_batch_size={closest}."
    )
