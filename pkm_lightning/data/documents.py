"""What readers of files yield: documents, in pieces where they are long, so that memory never holds a whole file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["Piece", "Reader", "Segment", "question_of"]


class Segment(NamedTuple):
    """Text that is tokenised on its own.

    Attributes:
        text: the text.
        learned: whether its tokens are targets; the end token of a document is one where its last segment is.
        rendered: whether names of control tokens in it mean these tokens, as in the text of a chat template.
    """

    text: str
    learned: bool = True
    rendered: bool = False


class Piece(NamedTuple):
    """A document, or a part of one that is too long to be held in memory.

    Attributes:
        file: number of its file among `Reader.files`.
        record: number of the document within its file (line, row, or place between separators), from 0.
        segments: of this piece. The tokens of a document are those of its segments, one after another, and the end
            token.
        ends: whether the document ends with this piece; its next piece follows at once if not.
    """

    file: int
    record: int
    segments: tuple[Segment, ...]
    ends: bool = True


class Reader(Protocol):
    """Documents of some files, in an order that is always the same.

    Optional: `skipped` (Counter of str), which counts by reason what the constructor has left out (`files of other
    endings: .py`) and the latest call of `pieces`; `consumed` (int), the bytes of the file under way, as it lies on
    disk, that were read so far, for the progress of compressed files.
    """

    @property
    def files(self) -> Sequence[Path]:
        """The files that are read, or one entry that stands for what is no file."""

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Yields the pieces of file `first_file` and of those behind it; blank documents are left out and counted.

        Raises:
            DataError: malformed input, with file and line, row or byte.
        """

    def where(self, file: int, record: int) -> str:
        """Returns the place of a document for messages, such as `answers.jsonl:12`."""


def question_of(piece: Piece) -> tuple[str, str] | None:
    """Returns prompt and answer of a document that is one question with its answer, else None."""
    if len(piece.segments) != 2 or not piece.ends:
        return None
    prompt, answer = piece.segments
    if prompt.learned or not answer.learned or prompt.rendered or answer.rendered:
        return None
    return prompt.text, answer.text.strip()
