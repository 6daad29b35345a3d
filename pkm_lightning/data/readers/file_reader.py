"""The part of a reader that does not depend on the format: which files there are, and what of them is left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from pkm_lightning.data.documents import Piece
from pkm_lightning.data.files import find_files, skipped_files

__all__ = ["FileReader"]


class FileReader(ABC):
    """Base of readers of files.

    Args:
        path: a file, a directory, a glob, or a list of them.
        endings: of the files that are read in a directory, without those of compression.
        key: that `path` is the value of.

    Raises:
        DataError: an entry of `path` does not exist or matches nothing.
    """

    def __init__(self, path: str | Sequence[str], *, endings: Sequence[str], key: str) -> None:
        self.path, self.endings, self.key = path, tuple(endings), key
        #: Bytes of the file under way, as it lies on disk, that have been read; about.
        self.consumed = 0
        # By file, so that one that is read again is counted once.
        self._left_out: dict[int, Counter[str]] = {}

    @cached_property
    def files(self) -> Sequence[Path]:
        """The files that are read."""
        return find_files(self.path, self.endings, self.key)

    @property
    def skipped(self) -> Counter[str]:
        """How much was left out of what has been read so far, by reason."""
        return sum(self._left_out.values(), self.other_files)

    @cached_property
    def other_files(self) -> Counter[str]:
        """How many files are left out, by reason."""
        others = skipped_files(self.path, self.endings)
        return Counter({f"files of other endings: {ending}": count for ending, count in others.items()})

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Yields the pieces of file `first_file` and of those behind it.

        Raises:
            DataError: malformed input, with file and line, row or byte.
        """
        for number in range(first_file, len(self.files)):
            left_out = self._left_out[number] = Counter()
            is_empty, self.consumed = True, 0
            for piece in self.read(number, left_out):
                is_empty = False
                yield piece
            if is_empty:
                left_out["empty files"] += 1

    def advance(self, position: int) -> None:
        """Records that the file under way has been read up to there."""
        self.consumed = position

    @abstractmethod
    def read(self, file: int, left_out: Counter[str]) -> Iterator[Piece]:
        """Yields the pieces of a file; counts in `left_out` what it leaves out, by reason."""

    @abstractmethod
    def where(self, file: int, record: int) -> str:
        """Returns the place of a document for messages."""
