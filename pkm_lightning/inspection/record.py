"""The record of an inspection: what the screen, the JSON file and the HTML page show.

Lists of reads are columns of the record's texts: `slots[t][c]`, `weights[t][c]` and `effects[t][c]` are of read c of
token t. Every part writes itself as plain JSON with the names of its fields.

Letters: T tokens of a text, C reads per token over all heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkm_lightning.errors import DataError

#: Of the format; a reader refuses any other.
VERSION = 1


@dataclass
class ReaderRecord:
    """One reader: the reads of one layer of one kind of slots.

    Attributes:
        name: `layer2.slot`, as in `usage.slot_readers`.
        layer: number of the block.
        table: key of `Record.slots`: `table0` for a set of value tables, the reader's name for experts.
        kind: what a slot is: `row` or `expert`.
        slots: number of slots N.
        heads: heads per token.
        reads: reads per head; C = heads * reads.
        by_tokens: whether tokens alone decide which slots are read.
    """

    name: str
    layer: int
    table: str
    kind: str
    slots: int
    heads: int
    reads: int
    by_tokens: bool = False


@dataclass
class ReadsRecord:
    """The reads of one reader in one text.

    Attributes:
        slots: (T, C) ids, -1 where an expert has not chosen the token.
        weights: (T, C), signed.
        effects: (T, C), what each read adds to the logit of the token's `scored` next token: that logit minus the one
            without the read, at the same position; None where effects were not computed. `Record.effects` names how.
    """

    slots: list[list[int]]
    weights: list[list[float]]
    effects: list[list[float]] | None = None


@dataclass
class TextRecord:
    """One text and what the model expects after each of its tokens.

    Attributes:
        title: a name for lists.
        tokens: (T), id and text of each token.
        targets: (T), the id of the next token; None behind the last one.
        scored: (T), the ids whose logits `effects` are of: the target, or the most likely token where there is none.
        p: (T), the probability of the scored token.
        top: (T, 5), id, text and probability of the most likely next tokens.
        p_without: (T), the probability of the scored token with every read of every reader at zero.
        top_without: (T, 5), as `top`, with every read at zero.
        reads: by the reader's name.
    """

    title: str
    tokens: list[tuple[int, str]]
    targets: list[int | None]
    scored: list[int]
    p: list[float]
    top: list[list[tuple[int, str, float]]]
    p_without: list[float]
    top_without: list[list[tuple[int, str, float]]] = field(default_factory=list)
    reads: dict[str, ReadsRecord] = field(default_factory=dict)


class SlotReading(NamedTuple):
    """One read of a slot by a token.

    Attributes:
        text: an index of `Record.texts`, or the name of a sequence of the data.
        position: of the token in that text.
        token: its text, that of the whole character where it is a part of one.
        weight: of the read, signed.
        reader: the reader's name.
        before, after: some text on both sides of the token.
    """

    text: int | str
    position: int
    token: str
    weight: float
    reader: str
    before: str = ""
    after: str = ""


class FactReading(NamedTuple):
    """One read of a slot where the answer to a question is predicted.

    Attributes:
        prompt, answer: of the question.
        weight: of the read, signed.
        reader: the reader's name.
    """

    prompt: str
    answer: str
    weight: float
    reader: str


@dataclass
class SlotRecord:
    """The readers of one slot.

    Attributes:
        reads: reads of the slot over the data that were passed through the model, and over the texts.
        readers: tokens that read it with the largest weights, largest first.
        facts: questions that read it with the largest weights where their answer is predicted.
    """

    reads: int
    readers: list[SlotReading] = field(default_factory=list)
    facts: list[FactReading] = field(default_factory=list)


@dataclass
class AblationRecord:
    """What changes without some slots.

    Attributes:
        masked: by the name of their table, ids of slots, or None for all of them.
        loss: nats per target of each text, with all reads; None for a text without targets.
        loss_without: the same without these slots.
        p_without: per text (T), the probability of the scored token without them.
        top_without: per text (T, 5), as `TextRecord.top`, without them.
        recall: share of the run's questions answered, with all reads; None where none were asked.
        recall_without: the same without these slots.
    """

    masked: dict[str, list[int] | None]
    loss: list[float | None]
    loss_without: list[float | None]
    p_without: list[list[float]]
    top_without: list[list[list[tuple[int, str, float]]]]
    recall: float | None = None
    recall_without: float | None = None


@dataclass
class Record:
    """All that an inspection reports.

    Attributes:
        model: the path of the model, or another name.
        readers: in the order of the layers.
        texts: the texts.
        slots: by the name of their table and by slot, as text: JSON has no other keys.
        ablations: what changes without some slots.
        effects: how `ReadsRecord.effects` were computed: `exact`, `gradient` or `none`.
        data: what `slots` were collected over, besides the texts; empty: nothing.
        version: of the format.

    Example: `docs/inspecting.md`.
    """

    model: str
    readers: list[ReaderRecord]
    texts: list[TextRecord]
    slots: dict[str, dict[str, SlotRecord]] = field(default_factory=dict)
    ablations: list[AblationRecord] = field(default_factory=list)
    effects: str = "exact"
    data: str = ""
    version: int = VERSION

    def to_json(self) -> str:
        """Returns the record as one line of JSON; numbers that are not finite are null."""
        return json.dumps(_plain(self), ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the record") -> Record:
        """Reads what `to_json` has written.

        Raises:
            DataError: no JSON, or a record of another version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version != VERSION:
                raise DataError(f"{source} is a record of version {version}, not {VERSION}; inspect again.")
            return cls(
                model=content["model"],
                readers=[ReaderRecord(**reader) for reader in content["readers"]],
                texts=[_text(one) for one in content["texts"]],
                slots={
                    table: {slot: _slot(one) for slot, one in slots.items()}
                    for table, slots in content["slots"].items()
                },
                ablations=[_ablation(one) for one in content["ablations"]],
                effects=content["effects"],
                data=content["data"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{source} is no record of an inspection ({reason:.80}).") from None


def _text(content: dict[str, Any]) -> TextRecord:
    tops = {name: _tops(content[name]) for name in ("top", "top_without")}
    tokens = [(token, text) for token, text in content["tokens"]]
    reads = {name: ReadsRecord(**one) for name, one in content["reads"].items()}
    return TextRecord(**{**content, **tops, "tokens": tokens, "reads": reads})


def _ablation(content: dict[str, Any]) -> AblationRecord:
    return AblationRecord(**{**content, "top_without": [_tops(of_text) for of_text in content["top_without"]]})


def _tops(rows: list[list[list[Any]]]) -> list[list[tuple[int, str, float]]]:
    return [[(token, text, p) for token, text, p in row] for row in rows]


def _slot(content: dict[str, Any]) -> SlotRecord:
    readers = [SlotReading(*one) for one in content["readers"]]
    return SlotRecord(content["reads"], readers, [FactReading(*one) for one in content["facts"]])


def _plain(value: Any) -> Any:
    """Returns dataclasses as dicts of their fields, tuples as lists, and numbers that JSON lacks as None."""
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in vars(value).items()}
