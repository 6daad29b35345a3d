"""Row ids of n-grams in Python's integers, one token at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pkm_lightning.memory.token_addressing import NGramAddressing


def plain_ids(part: NGramAddressing, tokens: Sequence[int], docs: Sequence[int]) -> list[list[int]]:
    """Returns the rows of each token of one sequence, in integers without bounds; a negative token is none."""
    end, canonical = int(part.end_id), part.canonical_ids.tolist()

    def earlier(t: int, distance: int) -> int:
        """Looks back, to the end token wherever the document does not reach."""
        passed = tokens[max(0, t - distance) : t]
        source = t - distance
        outside = source < 0 or tokens[source] < 0 or docs[source] != docs[t] or any(x in (end, -1) for x in passed)
        return end if outside else tokens[source]

    rows = []
    for t, token in enumerate(tokens):
        heads = zip(part.head_sizes.tolist(), part.head_offsets.tolist(), strict=True)
        rows.append([])
        for order in part.orders:
            window = [end if token < 0 else token] + [earlier(t, distance) for distance in range(1, order)]
            mix = 0
            for x, multiplier in zip(window, part.multipliers.tolist(), strict=False):
                mix ^= (canonical[x] * multiplier + 2**63) % 2**64 - 2**63
            rows[-1] += [mix % size + offset for size, offset in itertools.islice(heads, part.heads)]
    return rows
