"""The record of an inspection as one compressed block, small enough for a page of 10,000 tokens.

The block is the length of a JSON document, the document, and columns of numbers that the document names by place.
Texts that recur (tokens, excerpts, questions) are listed once. Readings of a slot by the record's own texts are left
out: the page sees them in the reads of these texts.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pkm_lightning.errors import DataError
from pkm_lightning.inspection.record import AblationRecord, ReadsRecord, Record, SlotRecord, TextRecord

#: In a column of tokens or slots: there is none.
_NOTHING = -1
#: Higher levels gain 1% and take three times as long.
_GZIP_LEVEL = 6

_Place = tuple[str, int, int]
_Top = Sequence[Sequence[tuple[int, str, float]]]


def packed(record: Record) -> str:
    """Returns the block in base64.

    Raises:
        DataError: columns that differ in length.
    """
    return _Packing().pack(record)


class _Packing:
    """The columns so far, and the texts that they name by number."""

    def __init__(self) -> None:
        self._columns: list[bytes] = []
        self._length = 0
        self._vocabulary: dict[tuple[int, str], int] = {}
        self._excerpts: dict[tuple[Any, ...], int] = {}
        self._questions: dict[tuple[str, str], int] = {}

    def pack(self, record: Record) -> str:
        """Returns the block, compressed, in base64."""
        content: dict[str, Any] = {
            "model": record.model,
            "effects": record.effects,
            "data": record.data,
            "readers": [vars(reader) for reader in record.readers],
            "texts": [self._text(text) for text in record.texts],
            "ablations": [self._ablation(ablation, record.texts) for ablation in record.ablations],
            "slots": {
                table: {"columns": self._slots(slots, [reader.name for reader in record.readers])}
                for table, slots in record.slots.items()
            },
        }
        content["vocabulary"] = list(self._vocabulary)
        content["excerpts"] = list(self._excerpts)
        content["questions"] = list(self._questions)
        document = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False).encode("ascii")
        block = b"".join([len(document).to_bytes(4, "little"), document, *self._columns])
        return base64.b64encode(gzip.compress(block, _GZIP_LEVEL, mtime=0)).decode("ascii")

    def _text(self, text: TextRecord) -> dict[str, Any]:
        length = len(text.tokens)
        known = {token: (token, content) for token, content in text.tokens}
        known |= {token: (token, content) for row in text.top for token, content, _ in row}
        scored = [known.get(token, (token, f"#{token}")) for token in text.scored]
        # One id may have several texts: bytes of a character are shown by their neighbours.
        for t, (token, _) in enumerate(text.tokens[1:]):
            if text.scored[t] == token:
                scored[t] = text.tokens[t + 1]
        columns = {
            "tokens": self._tokens(text.tokens),
            "targets": self._integers([_NOTHING if target is None else target for target in text.targets]),
            "scored": self._tokens(scored),
            "p": self._figures(text.p),
            "p_without": self._figures(text.p_without),
            **self._top("top", text.top),
            **self._top("top_without", text.top_without),
        }
        for name in ("tokens", "targets", "scored", "p", "p_without"):
            if columns[name][2] != length:
                raise DataError(f"text {text.title!r} has {length} tokens, but {columns[name][2]} values of {name}.")
        reads = {name: {"columns": self._reads(text, name, reads)} for name, reads in text.reads.items()}
        return {"title": text.title, "columns": columns, "reads": reads}

    def _reads(self, text: TextRecord, name: str, reads: ReadsRecord) -> dict[str, _Place]:
        shape = np.shape(reads.slots)
        for column, values in (("weights", reads.weights), ("effects", reads.effects)):
            if values is not None and np.shape(values) != shape:
                raise DataError(
                    f"text {text.title!r} has {name} slots of shape {shape}, but {column} of {np.shape(values)}."
                )
        columns = {"slots": self._integers(reads.slots), "weights": self._figures(reads.weights)}
        return columns if reads.effects is None else {**columns, "effects": self._figures(reads.effects)}

    def _ablation(self, ablation: AblationRecord, texts: Sequence[TextRecord]) -> dict[str, Any]:
        of_texts = [
            {"columns": {"p_without": self._figures(p), **self._top("top_without", top)}}
            for p, top, _ in zip(ablation.p_without, ablation.top_without, texts, strict=True)
        ]
        named = ("masked", "loss", "loss_without", "recall", "recall_without")
        return {**{name: getattr(ablation, name) for name in named}, "texts": of_texts}

    def _slots(self, slots: Mapping[str, SlotRecord], readers: Sequence[str]) -> dict[str, _Place]:
        """Stores, by slot, where its readings end, and the readings one after the other."""
        ends: list[list[int]] = []
        readings: list[tuple[int, float, int]] = []
        facts: list[tuple[int, float, int]] = []
        for slot, one in slots.items():
            for reading in one.readers:
                if isinstance(reading.text, str):
                    excerpt = (reading.text, reading.position, reading.token, reading.before, reading.after)
                    number = self._excerpts.setdefault(excerpt, len(self._excerpts))
                    readings.append((number, reading.weight, readers.index(reading.reader)))
            for fact in one.facts:
                number = self._questions.setdefault((fact.prompt, fact.answer), len(self._questions))
                facts.append((number, fact.weight, readers.index(fact.reader)))
            ends.append([int(slot), one.reads, len(readings), len(facts)])
        columns = {}
        for name, values in zip(
            ("ids", "reads", "readings_end", "facts_end"), np.array(ends).reshape(-1, 4).T, strict=True
        ):
            columns[name] = self._integers(values)
        for name, rows in (("readings", readings), ("facts", facts)):
            columns[f"{name}_text"] = self._integers([number for number, _, _ in rows])
            columns[f"{name}_weight"] = self._figures([weight for _, weight, _ in rows])
            columns[f"{name}_reader"] = self._integers([reader for _, _, reader in rows])
        return columns

    def _top(self, name: str, top: _Top) -> dict[str, _Place]:
        width = max((len(row) for row in top), default=0)
        padded = [[*row, *[None] * (width - len(row))] for row in top]
        tokens = [[_NOTHING if one is None else self._token(one[0], one[1]) for one in row] for row in padded]
        figures = [[math.nan if one is None else one[2] for one in row] for row in padded]
        return {name: self._integers(tokens), f"{name}_p": self._figures(figures)}

    def _tokens(self, tokens: Iterable[tuple[int, str]]) -> _Place:
        return self._integers([self._token(*token) for token in tokens])

    def _token(self, token: int, text: str) -> int:
        return self._vocabulary.setdefault((token, text), len(self._vocabulary))

    def _integers(self, values: Any) -> _Place:
        return self._column("i4", np.asarray(values, dtype=np.int64).astype("<i4", casting="same_kind"))

    def _figures(self, values: Any) -> _Place:
        # None, which JSON has for numbers that are not finite, becomes NaN.
        return self._column("f4", np.asarray(values, dtype=np.float64).astype("<f4"))

    def _column(self, kind: str, values: np.ndarray) -> _Place:
        """Stores a column and returns its place: kind, first byte, number of values."""
        # All first bytes, then all second bytes: gzip packs those of figures a quarter smaller that way.
        planes = values.reshape(-1, 1).view(np.uint8).T.tobytes()
        place = (kind, self._length, values.size)
        self._columns.append(planes)
        self._length += len(planes)
        return place


def _finite(value: Any) -> Any:
    """Returns `value` with None for numbers that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
