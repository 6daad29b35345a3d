"""The main readers of slots: tokens and questions of a data set, in one pass of observed forwards.

Of each slot the readings with the largest weights are held, so that memory grows with the number of slots that are
asked for, and not with the data. Those are the slots that the texts of the record read.

Letters: L reads of a batch, U slots that are asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pkm_lightning.data.base import RecallItem, TextCodec, answer_ids, prompt_ids
from pkm_lightning.inspection.foreign import codec_of, trunk_of
from pkm_lightning.inspection.record import FactReading, Record, SlotReading, SlotRecord
from pkm_lightning.inspection.slot_sets import inspected_readers, set_of_readers, slot_sets
from pkm_lightning.inspection.windows import Pieces
from pkm_lightning.usage.slot_readers import Reader

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer

#: Tokens of context on each side of a reader.
_AROUND = 8
#: Questions per forward.
_QUESTIONS = 32


class _Sequence(NamedTuple):
    """A sequence of a batch, for the excerpts: its name or number, its tokens, and the document that each is of."""

    title: int | str
    ids: list[int]
    documents: list[int]

    def around(self, place: int) -> tuple[list[int], list[int]]:
        """Returns the tokens up to `place` and those behind it, few and of its document alone."""
        low, high = max(0, place - _AROUND), place + 1 + _AROUND
        nearby = range(low, min(high, len(self.ids)))
        same = [n for n in nearby if self.documents[n] == self.documents[place]]
        return [self.ids[n] for n in same if n <= place], [self.ids[n] for n in same if n > place]


@dataclass
class _Heaps:
    """The largest readings of the slots of one set.

    Args:
        slots_U: the slots, ascending.
        most: readings per slot.
    """

    slots_U: Tensor
    most: int
    counts_U: Tensor = field(init=False)
    #: The smallest weight that each full heap holds: smaller ones need not leave the tensor.
    _least_U: Tensor = field(init=False)
    heaps: list[list[tuple[float, int, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.slots_U)
        self.counts_U = torch.zeros(count, dtype=torch.int64)
        self._least_U = torch.full((count,), -1.0)
        self.heaps = [[] for _ in range(count)]
        self._pushed = 0

    def add(self, ids_TC: Tensor, weights_TC: Tensor, is_real_T: Tensor, make: Any, tokens: int = 1) -> None:
        """Enters reads; `make(t, c)` returns what is held of read c of token t.

        Of each `tokens` tokens only the read of a slot with the largest weight is held, as of the heads of one token.
        """
        if not len(self.slots_U):
            return
        ids_TC, weights_TC = ids_TC.long().cpu(), weights_TC.float().cpu()
        place_TC = torch.searchsorted(self.slots_U, ids_TC.contiguous()).clamp_max(len(self.slots_U) - 1)
        asked_TC = (self.slots_U[place_TC] == ids_TC) & is_real_T.cpu().unsqueeze(1)
        self.counts_U += torch.bincount(place_TC[asked_TC], minlength=len(self.slots_U))
        size_TC = weights_TC.abs()
        token_L, read_L = torch.nonzero(asked_TC & (size_TC > self._least_U[place_TC]), as_tuple=True)
        place_L, size_L = place_TC[token_L, read_L], size_TC[token_L, read_L]
        # The largest first: most of what follows is then below the smallest of a full heap.
        entered: set[tuple[int, int]] = set()
        for i in size_L.argsort(descending=True, stable=True).tolist():
            place, size = int(place_L[i]), float(size_L[i])
            heap, owner = self.heaps[place], (place, int(token_L[i]) // tokens)
            if owner in entered or (len(heap) == self.most and size <= heap[0][0]):
                continue
            entered.add(owner)
            self._pushed += 1  # of equal weights the first ones stay, and nothing that is held is compared
            entry = (size, -self._pushed, make(int(token_L[i]), int(read_L[i])))
            (heapq.heappushpop if len(heap) == self.most else heapq.heappush)(heap, entry)
            if len(heap) == self.most:
                self._least_U[place] = heap[0][0]

    def largest(self, place: int) -> list[Any]:
        """Returns what is held of a slot, the largest weight first."""
        return [held for *_, held in sorted(self.heaps[place], reverse=True)]


@torch.no_grad()
def add_slot_readings(
    record: Record,
    model: Transformer | nn.Module,
    tokenizer: TextCodec | Any,
    batches: Iterable[Mapping[str, Tensor]] = (),
    questions: Sequence[RecallItem] = (),
    *,
    most: int = 8,
    data: str = "",
) -> None:
    """Fills `record.slots` with the readers of every slot that the record's texts read.

    Args:
        record: of `trace`.
        model: that of the record.
        tokenizer: as for `trace`.
        batches: batches of data, as a data module yields them; `slots` counts their reads.
        questions: whose reads count where a token of the answer is predicted; they are not counted in `reads`.
        most: readings per slot that are held, 1 or more.
        data: what `record.data` calls the batches, and the beginning of the names of their sequences.

    Example: `docs/inspecting.md`.
    """
    model, tokenizer = trunk_of(model), codec_of(tokenizer)
    readers = inspected_readers(model)
    of_reader = {name: one.name for name, one in set_of_readers(slot_sets(readers)).items()}
    tokens = {name: _Heaps(slots_U, most) for name, slots_U in _slots_of(record).items()}
    facts = {name: _Heaps(heaps.slots_U, most) for name, heaps in tokens.items()}
    record.data = data
    _add_texts(record, tokens, of_reader)
    number = 0
    device = model.embedding.weight.device
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            on_device = {name: value.to(device) for name, value in batch.items()}
            sequences = _sequences(batch, data, number)
            _add_batch(model, readers, of_reader, tokens, on_device, sequences)
            number += len(sequences)
        for start in range(0, len(questions), _QUESTIONS):
            _add_questions(model, readers, of_reader, facts, tokenizer, questions[start : start + _QUESTIONS])
    pieces = Pieces(tokenizer)
    for name, heaps in tokens.items():
        record.slots[name] = {
            str(slot): SlotRecord(
                int(heaps.counts_U[place]),
                [_reading(pieces, *held) for held in heaps.largest(place)],
                _distinct(facts[name].largest(place)),
            )
            for place, slot in enumerate(heaps.slots_U.tolist())
        }


def _slots_of(record: Record) -> dict[str, Tensor]:
    """Returns the slots that the record's texts read, ascending, by the name of their set."""
    slots: dict[str, set[int]] = {reader.table: set() for reader in record.readers}
    for text in record.texts:
        for reader in record.readers:
            slots[reader.table] |= {slot for row in text.reads[reader.name].slots for slot in row if slot >= 0}
    return {name: torch.tensor(sorted(ids), dtype=torch.int64) for name, ids in slots.items()}


def _add_texts(record: Record, tokens: Mapping[str, _Heaps], of_reader: Mapping[str, str]) -> None:
    for number, text in enumerate(record.texts):
        ids = [token for token, _ in text.tokens]
        for name, reads in text.reads.items():
            if reads.slots:
                ids_TC, weights_TC = torch.tensor(reads.slots), torch.tensor(reads.weights)
                is_real_T = torch.ones(len(ids), dtype=torch.bool)
                make = _reading_maker([_Sequence(number, ids, [0] * len(ids))], len(ids), weights_TC, name)
                tokens[of_reader[name]].add(ids_TC, weights_TC, is_real_T, make)


def _reading_maker(sequences: Sequence[_Sequence], width: int, weights_TC: Tensor, reader: str) -> Any:
    def make(t: int, c: int) -> tuple[int | str, int, list[int], list[int], float, str]:
        sequence, place = sequences[t // width], t % width
        before, after = sequence.around(place)
        return (
            sequence.title,
            place,
            before,
            after,
            float(weights_TC[t, c]),
            reader,
        )

    return make


def _reading(
    pieces: Pieces, title: int | str, place: int, before: list[int], after: list[int], weight: float, reader: str
) -> SlotReading:
    text_before, token, text_after = pieces.excerpt([*before, *after], len(before) - 1)
    return SlotReading(title, place, token, weight, reader, text_before, text_after)


def _sequences(batch: Mapping[str, Tensor], data: str, number: int) -> list[_Sequence]:
    """Returns the sequences of a batch, numbered on from `number`; padding is a document of its own."""
    ids_BT = batch["input_ids"]
    documents_BT = batch.get("doc_ids", torch.zeros_like(ids_BT)).where(_is_real(batch), -1)
    rows = zip(ids_BT.tolist(), documents_BT.tolist(), strict=True)
    return [_Sequence(f"{data} {number + row}", ids, documents) for row, (ids, documents) in enumerate(rows, 1)]


def _is_real(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns False at padding, (B, T)."""
    real_BT = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if "valid" in batch:
        real_BT = real_BT & batch["valid"]
    return real_BT & (batch["doc_ids"] >= 0) if "doc_ids" in batch else real_BT


def _add_batch(
    model: Transformer,
    readers: Mapping[str, Reader],
    of_reader: Mapping[str, str],
    heaps: Mapping[str, _Heaps],
    batch: dict[str, Tensor],
    sequences: Sequence[_Sequence],
) -> None:
    traces = model(
        batch["input_ids"], doc_ids_BT=batch.get("doc_ids"), valid_BT=batch.get("valid"), observe=True
    ).traces
    is_real_T, width = _is_real(batch).flatten(), batch["input_ids"].shape[1]
    for name, reader in readers.items():
        reads = reader.reads(traces, batch)
        if reads is not None:
            weights_TC = reads.weights_THK.flatten(1)
            make = _reading_maker(sequences, width, weights_TC, name)
            heaps[of_reader[name]].add(reads.ids_THK.flatten(1), weights_TC, is_real_T, make)


def _add_questions(
    model: Transformer,
    readers: Mapping[str, Reader],
    of_reader: Mapping[str, str],
    heaps: Mapping[str, _Heaps],
    tokenizer: TextCodec,
    questions: Sequence[RecallItem],
) -> None:
    prompts = [prompt_ids(tokenizer, item.prompt) or [tokenizer.eos_id] for item in questions]
    answers = [answer_ids(tokenizer, item.answer) for item in questions]
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))
    # Padding follows the last token that counts, and attention is causal.
    ids_BT = torch.full((len(questions), width), tokenizer.eos_id)
    predicts_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*prompt, *answer[:-1]]
        ids_BT[row, : len(whole)] = torch.tensor(whole)
        predicts_BT[row, len(prompt) - 1 : len(whole)] = True
    ids_BT = ids_BT.to(model.embedding.weight.device)
    traces = model(ids_BT, observe=True).traces
    for name, reader in readers.items():
        reads = reader.reads(traces, {"input_ids": ids_BT})
        if reads is not None:
            weights_TC = reads.weights_THK.flatten(1)

            def make(t: int, c: int, weights_TC: Tensor = weights_TC, name: str = name) -> FactReading:
                item = questions[t // width]
                return FactReading(item.prompt, item.answer, float(weights_TC[t, c]), name)

            heaps[of_reader[name]].add(reads.ids_THK.flatten(1), weights_TC, predicts_BT.flatten(), make, width)


def _distinct(facts: Sequence[FactReading]) -> list[FactReading]:
    """Returns the facts, each once with its largest weight: several readers may share the slot."""
    once: dict[tuple[str, str], FactReading] = {}
    for fact in facts:
        once.setdefault((fact.prompt, fact.answer), fact)
    return list(once.values())
