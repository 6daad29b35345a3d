"""A shuffle of 0..n-1 that is computed from the place alone, so that its memory and start cost nothing for any n.

A Feistel network over the pairs (x, y) with x < a, y < b and a * b >= n: its rounds add to x a hash of y and to y a
hash of x in turn, which can be undone, so that no two pairs become one. A pair that stands for n or more is sent
through again until it does not, which leaves a permutation of the others ("cycle walking"; Black and Rogaway, Ciphers
with Arbitrary Finite Domains, CT-RSA 2002). With a = ceil(sqrt(n)) fewer than a of a * b pairs stand for n or more.

Letters: M places asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np

__all__ = ["Permutation", "mixed_bits"]

#: Four are enough for long lists (Luby and Rackoff, 1988). For a list of five a hash has two or three values: after 8
#: rounds some of its 120 orders are still rarer than others, after 12 none is.
ROUNDS = 12
#: Multipliers and shifts of Stafford's variant 13 of the 64-bit finaliser of MurmurHash3, as in SplitMix64.
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Permutation(Sequence[int]):
    """The numbers 0..n-1 in an order that depends on n, seed and epoch alone.

    Args:
        n: 1 or more.
        seed, epoch: 0 or more.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self._n = n
        columns = math.isqrt(n - 1) + 1
        self._sizes = np.uint64(columns), np.uint64(-(-n // columns))
        # The raw stream of a named generator, which no release of NumPy changes.
        self._keys = np.random.PCG64([seed, epoch]).random_raw(ROUNDS)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(self._n)[index]
        if isinstance(places, int):
            return int(self.at(np.asarray([places]))[0])
        numbers: list[int] = self.at(np.arange(places.start, places.stop, places.step)).tolist()
        return numbers

    def at(self, places_M: np.ndarray) -> np.ndarray:
        """Returns the numbers at some places, each from 0 to n - 1, as int64."""
        number_M = self._network(places_M.astype(np.uint64))
        outside_M = number_M >= self._n
        while outside_M.any():
            number_M[outside_M] = self._network(number_M[outside_M])
            outside_M = number_M >= self._n
        return number_M.astype(np.int64)

    def _network(self, pair_M: np.ndarray) -> np.ndarray:
        a, b = self._sizes
        x_M: np.ndarray = pair_M % a
        y_M: np.ndarray = pair_M // a
        for i, key in enumerate(self._keys):
            if i % 2:
                y_M = (y_M + mixed_bits(x_M ^ key) % b) % b
            else:
                x_M = (x_M + mixed_bits(y_M ^ key) % a) % a
        return x_M + a * y_M


def mixed_bits(bits_M: np.ndarray) -> np.ndarray:
    """Returns a hash of each 64-bit number, which no other number has: the finaliser of SplitMix64."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        bits_M = (bits_M ^ (bits_M >> shift)) * multiplier
    return bits_M ^ (bits_M >> SHIFTS[-1])
