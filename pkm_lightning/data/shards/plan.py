"""Which part each piece of text belongs to, while it streams by.

A first look at the documents (`survey`) finds how many there are, as far as that matters: 1,000 and more are divided by
the hash of their number alone, fewer so that no part is empty, and plain text in fewer than 10 documents is cut near
its end, which may fall within a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkm_lightning.data.chunks import MAX_WORD_CHARACTERS
from pkm_lightning.data.documents import Piece, Reader, Segment
from pkm_lightning.data.split import ENOUGH_DOCUMENTS, FIRST_DOCUMENTS, Fractions, always_held_out, part_of
from pkm_lightning.errors import DataError, counted

__all__ = ["Divider", "Plan", "Portion", "survey"]


class Portion(NamedTuple):
    """A piece of a document within one part.

    Attributes:
        part: `train`, `validation` or `test`.
        begins, ends: whether the document, or what this part holds of it, begins or ends here.
        piece: what it is taken from.
        segments: of this portion.
    """

    part: str
    begins: bool
    ends: bool
    piece: Piece
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Plan:
    """How the documents of one reader are divided.

    Attributes:
        main: part of the documents that are not held out.
        fractions: of the parts that are held out; 0 for those that have files of their own.
        held_out: the parts of some documents by their numbers, whatever their hashes are.
        cuts: where parts begin that are cut off the end of the text: part, and characters before it. A cut is moved on
            to the end of a word. None where whole documents are held out.
    """

    main: str
    fractions: Fractions
    held_out: dict[int, str] = field(default_factory=dict)
    cuts: tuple[tuple[str, int], ...] | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Returns the plan whose fields, as `dataclasses.asdict` returns them, went through JSON."""
        held_out = {int(number): part for number, part in values["held_out"].items()}
        cuts = None if values["cuts"] is None else tuple((part, place) for part, place in values["cuts"])
        return cls(values["main"], Fractions(**values["fractions"]), held_out, cuts)


def survey(reader: Reader, fractions: Fractions, name: str) -> Plan:
    """Returns how the documents of `reader` are divided; reads until 1,000 of them are known.

    Args:
        reader: of the training text.
        fractions: of the parts that are held out of it.
        name: of the text in messages, such as `data.path=books`.

    Raises:
        DataError: there is no document, or fewer than there are parts.
    """
    documents = characters = 0
    is_plain = True
    for piece in reader.pieces():
        documents += piece.ends
        characters += sum(len(segment.text) for segment in piece.segments)
        is_plain &= len(piece.segments) == 1 and piece.segments[0].learned and not piece.segments[0].rendered
        if documents == FIRST_DOCUMENTS:
            break
    parts = [part for part in ("validation", "test") if getattr(fractions, part)]
    if documents == 0:
        count = counted(len(reader.files), "file")
        raise DataError(f"{name}: no text in {count}; give files that are not empty.")
    if documents < ENOUGH_DOCUMENTS and is_plain and parts:
        return Plan("train", fractions, cuts=_cuts(characters, fractions, parts))
    if documents <= len(parts):
        names = " and ".join(["training", *parts] if len(parts) == 1 else ["training, validation", "testing"])
        raise DataError(f"{name} has {counted(documents, 'document')}; {names} need one each.")
    held_out = always_held_out(documents, fractions)
    return Plan("train", fractions, held_out)


def _cuts(characters: int, fractions: Fractions, parts: list[str]) -> tuple[tuple[str, int], ...]:
    behind = {"validation": fractions.validation + fractions.test, "test": fractions.test}
    return tuple((part, round(characters * (1 - behind[part]))) for part in parts)


@dataclass
class Divider:
    """The state of dividing a stream of pieces; the fields other than `plan` are what a resumed build needs.

    Attributes:
        plan: of the division.
        documents: that have ended.
        is_open: whether a document is under way in the current part.
        characters: that went by.
        passed: cuts that were made.
    """

    plan: Plan
    documents: int = 0
    is_open: bool = False
    characters: int = 0
    passed: int = 0

    def divide(self, piece: Piece) -> Iterator[Portion]:
        """Yields the portions of the next piece."""
        if self.plan.cuts is not None:
            yield from self._cut(piece)
        else:
            part = part_of(self.documents, self.plan.fractions, self.plan.held_out)
            yield self._portion(self.plan.main if part == "train" else part, piece, piece.segments, piece.ends)
        self.documents += piece.ends

    def _cut(self, piece: Piece) -> Iterator[Portion]:
        assert self.plan.cuts is not None
        text, begin, names = piece.segments[0].text, 0, [self.plan.main, *(part for part, _ in self.plan.cuts)]
        while self.passed < len(self.plan.cuts):
            place = self.plan.cuts[self.passed][1] - self.characters
            if place >= len(text):
                break
            end = max(begin, word_end(text, max(0, place)))
            if self.is_open or text[begin:end].strip():
                yield self._portion(names[self.passed], piece, (Segment(text[begin:end]),), True)
            begin = end
            self.passed += 1
        if self.is_open or text[begin:].strip():
            yield self._portion(names[self.passed], piece, (Segment(text[begin:]),), piece.ends)
        self.characters += len(text)

    def _portion(self, part: str, piece: Piece, segments: tuple[Segment, ...], ends: bool) -> Portion:
        begins, self.is_open = not self.is_open, not ends
        return Portion(part, begins, ends, piece, segments)


def word_end(text: str, cut: int) -> int:
    """Returns the end of the word that character `cut` falls into, or `cut` itself if no word ends nearby."""
    end = cut
    while end < len(text) and not text[end].isspace():
        end += 1
        if end - cut > MAX_WORD_CHARACTERS:
            return cut
    return end
