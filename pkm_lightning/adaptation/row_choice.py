"""Which rows may move: those that the facts read often and other text seldom reads (TF-IDF).

    score(fact, row) = sum of |weight| of the fact's reads of the row * ln((2 + n) / (1 + n_row))

where n sequences of other text were read, n_row of which read the row. Of each fact the best rows are taken, from all
tables together.

Letters: B sequences, T positions, H heads, K reads per head, X reads, N slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.memory import ValueTable
from pkm_lightning.usage.slot_readers import Reader, TableSet, find_readers, find_tables

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk


class SlotReads:
    """The reads of a model's slots.

    Args:
        model: in evaluation mode.

    Attributes:
        readers: by name.
        sets: sets of tables by name.
    """

    def __init__(self, model: Trunk) -> None:
        self._model = model
        self.readers = {name: reader for name, reader in find_readers(model).items() if reader.slots.tables}
        self.sets = find_tables(self.readers)
        self._last = len(model.blocks) - 1

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Returns by set of tables the reads of a batch: the sequence, the slot and |weight| of each, (X,) each.

        Left out are padding (`valid`) and, in the last layer, positions without a target, whose output nothing reads.
        """
        ids_BT = batch["input_ids"]
        traces = self._model(ids_BT, doc_ids_BT=batch.get("doc_ids"), observe=True).traces  # type: ignore[operator]
        sequence_T = torch.arange(len(ids_BT), device=ids_BT.device).repeat_interleave(ids_BT.shape[1])
        counts_T = batch["valid"].flatten() if "valid" in batch else torch.ones_like(sequence_T, dtype=torch.bool)
        reads: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, table_set in self.sets.items():
            parts = []
            for reader in (self.readers[reader] for reader in table_set.readers):
                read = reader.reads(traces, batch)
                if read is None:
                    continue
                is_last = reader.layer == self._last and not reader.part.startswith("before")
                taken_T = counts_T & (batch["labels"] != NO_TARGET).flatten() if is_last else counts_T
                slots_TK, weights_TK = read.ids_THK.flatten(1)[taken_T], read.weights_THK.flatten(1)[taken_T]
                sequence_TK = sequence_T[taken_T].unsqueeze(1).expand_as(slots_TK)
                parts.append(torch.stack([sequence_TK, slots_TK.long()]).flatten(1))
                parts.append(weights_TK.detach().abs().double().flatten())
            if parts:
                places_2X, weights_X = torch.cat(parts[::2], 1), torch.cat(parts[1::2])
                within_X = places_2X[1] < _slots(self.readers, table_set)
                reads[name] = (places_2X[0, within_X], places_2X[1, within_X], weights_X[within_X])
        return reads


def _slots(readers: Mapping[str, Reader], table_set: TableSet) -> int:
    return max(readers[name].slots.count for name in table_set.readers)


class ReadFrequencies:
    """In how many sequences of other text each slot is read.

    Attributes:
        n_sequences: sequences that were read.
        by_set: numbers of sequences by set of tables and slot, (N,) int64.
    """

    def __init__(self, reads: SlotReads, batches: Iterable[Batch]) -> None:
        self.n_sequences = 0
        self.by_set: dict[str, Tensor] = {}
        for batch in batches:
            self.n_sequences += len(batch["input_ids"])
            for name, (sequence_X, slot_X, _) in reads.of(batch).items():
                n_slots = _slots(reads.readers, reads.sets[name])
                distinct = torch.unique(sequence_X * n_slots + slot_X) % n_slots
                counts_N = torch.bincount(distinct, minlength=n_slots)
                self.by_set[name] = self.by_set.get(name, 0) + counts_N

    def rarity(self, name: str, slot_X: Tensor) -> Tensor:
        """Returns ln((2 + n) / (1 + n_row)) of slots of a set, fp64."""
        counts_N = self.by_set.get(name)
        read_X = torch.zeros_like(slot_X, dtype=torch.float64) if counts_N is None else counts_N[slot_X].double()
        return math.log(2 + self.n_sequences) - torch.log1p(read_X)


def choose_slots(
    reads: SlotReads, batches: Iterable[tuple[Batch, Sequence[int]]], frequencies: ReadFrequencies, *, per_fact: int
) -> dict[str, list[Tensor]]:
    """Returns by set of tables the slots that each fact may move, in ascending order.

    Args:
        reads: of the model.
        batches: of sequences of facts, each with the numbers of their facts; together they number 0, 1, ...
        frequencies: of other text.
        per_fact: most slots of a fact, over all sets.
    """
    scores: dict[int, dict[tuple[str, int], float]] = {}
    for batch, facts in batches:
        fact_B = torch.tensor(facts, device=batch["input_ids"].device)
        for name, (sequence_X, slot_X, weight_X) in reads.of(batch).items():
            n_slots = _slots(reads.readers, reads.sets[name])
            keys_U, place_X = torch.unique(fact_B[sequence_X] * n_slots + slot_X, return_inverse=True)
            sums_U = torch.zeros(len(keys_U), dtype=torch.float64, device=keys_U.device).index_add_(
                0, place_X, weight_X
            )
            sums_U *= frequencies.rarity(name, keys_U % n_slots)
            for key, score in zip(keys_U.tolist(), sums_U.tolist(), strict=True):
                of_fact = scores.setdefault(key // n_slots, {})
                place = (name, key % n_slots)
                of_fact[place] = of_fact.get(place, 0.0) + score
    chosen: dict[str, list[Tensor]] = {name: [] for name in reads.sets}
    for _, of_fact in sorted(scores.items()):
        best = sorted((place for place in of_fact if of_fact[place] > 0), key=lambda place: (-of_fact[place], place))
        for name in chosen:
            slots = sorted(slot for where, slot in best[:per_fact] if where == name)
            chosen[name].append(torch.tensor(slots, dtype=torch.int64))
    return chosen


def lines_of(table: ValueTable, slots_U: Tensor) -> Tensor:
    """Returns the lines of slots, which are rows: all slices of each, in ascending order."""
    return (slots_U.unsqueeze(1) * table.slices + torch.arange(table.slices)).flatten()
