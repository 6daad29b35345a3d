"""Counters per head of a reader: `halves` counts the 2 * S sub-keys of each head, `full` all N slots of each head.

`full` is a histogram of slots per head, N / 2S times as large; the counts of sub-keys follow from it.

Letters: C = H * K reads per token, Z counters of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pkm_lightning.ffn import Slots
from pkm_lightning.usage.read_counts import ReadCounts
from pkm_lightning.usage.slot_readers import Reads

PerHead = Literal["halves", "full"]


def counts_heads(slots: Slots, heads: int, kind: PerHead) -> bool:
    """Returns whether counters per head would hold more than those of all heads together."""
    return slots.n_keys is not None or (kind == "full" and heads > 1)


class HeadCounts(ReadCounts):
    """The counters of all heads of one reader, one head after the other.

    Args:
        slots: the slots of the reader.
        heads: H.
        kind: `halves` (slots must be pairs of sub-keys) or `full`.
        half, device, step: as of `ReadCounts`.
    """

    def __init__(self, slots: Slots, *, heads: int, kind: PerHead, half: int, device: torch.device, step: int) -> None:
        self.slots, self.heads, self.kind = slots, heads, kind
        super().__init__(
            heads * (slots.count if kind == "full" else 2 * self._keys), half=half, device=device, step=step
        )

    @property
    def _keys(self) -> int:
        assert self.slots.n_keys is not None
        return self.slots.n_keys

    def add_reads(self, reads: Reads, step: int) -> None:
        """Counts the reads of a micro-batch of `step`."""
        ids_THK = reads.ids_THK.long()
        # An id out of range would otherwise be a counter of another head.
        is_slot_THK = (ids_THK >= 0) & (ids_THK < self.slots.count)
        first_H1 = torch.arange(self.heads, device=ids_THK.device)[:, None] * (self.n_slots // self.heads)
        numbers = [ids_THK] if self.kind == "full" else [ids_THK // self._keys, ids_THK % self._keys + self._keys]
        for number_THK in numbers:
            # Ids of -1 go to the counter that is never read.
            ids_TC = (number_THK + first_H1).where(is_slot_THK, -1).flatten(1)
            self.add(ids_TC, reads.weights_THK.flatten(1), reads.valid_T, step)

    def by_sub_key(self, values_Z: Tensor, reduce: Callable[[Tensor, int], Any]) -> Tensor:
        """Returns values of the counters as (H, 2, S); with `full`, `reduce` (sum or amax) joins those of its slots."""
        if self.kind == "halves":
            return values_Z.view(self.heads, 2, self._keys)
        values_HSS = values_Z.view(self.heads, self._keys, self._keys)
        return torch.stack([reduce(values_HSS, 2), reduce(values_HSS, 1)], dim=1)

    def by_slot(self, values_Z: Tensor) -> Tensor:
        """Returns values of the counters of `full` as (H, N)."""
        assert self.kind == "full"
        return values_Z.view(self.heads, self.slots.count)
