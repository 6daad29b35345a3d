"""A reader of the simplest kind: a line of a file is a document, `QUESTION|ANSWER` a question. It needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.errors import DataError


class LineReader:
    """A document per line; one with ` ~ ` comes in a piece per side, `BAD` is malformed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.skipped: Counter[str] = Counter({"files of other endings: .py": 2})

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        for file in range(first_file, len(self.files)):
            for record, line in enumerate(self.files[file].read_text().splitlines()):
                if not line.strip():
                    self.skipped["blank documents"] += 1
                    continue
                if line == "BAD":
                    raise DataError(f"{self.where(file, record)} is malformed.")
                *first, last = line.split(" ~")
                for part in first:
                    yield Piece(file, record, (Segment(part),), ends=False)
                yield Piece(file, record, segments_of(last))

    def where(self, file: int, record: int) -> str:
        return f"{self.files[file]}:{record + 1}"


def segments_of(line: str) -> tuple[Segment, ...]:
    question, bar, answer = line.partition("|")
    return (Segment(question, learned=False), Segment(answer)) if bar else (Segment(line),)


def content(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
