"""Text files as documents, in pieces of bounded size: a file of any size is read in the memory of a few blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pkm_lightning.data.chunks import MAX_CHUNK_CHARACTERS, chunks
from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.readers.decoding import text_blocks
from pkm_lightning.data.readers.file_reader import FileReader

__all__ = ["TextReader", "split_documents"]

#: A document of more characters comes in pieces.
PIECE_CHARACTERS = 500_000
#: Characters of which lines consist that separate documents.
_BLANK = " \t\r\n"


class TextReader(FileReader):
    """Documents of UTF-8 text files, plain or compressed.

    Args:
        path: a file, a directory, a glob, or a list of them.
        endings: of the files that are read in a directory.
        document_separator: blank lines (or more) that end a document; None makes each file one document.
        key: that `path` is the value of.

    Raises:
        DataError: an entry of `path` does not exist or matches nothing.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        endings: Sequence[str],
        document_separator: int | None,
        key: str = "data.path",
    ) -> None:
        super().__init__(path, endings=endings, key=key)
        self.document_separator = document_separator

    def read(self, file: int, left_out: Counter[str]) -> Iterator[Piece]:
        """Yields the pieces of a file's documents that are not blank."""
        parts = _Parts()
        for text, ends in split_documents(text_blocks(self.files[file], self.advance), self.document_separator):
            for piece in parts.add(text, ends):
                yield Piece(file, parts.number, (Segment(piece),), ends=False)
            if ends:
                if parts.is_blank:
                    left_out["blank documents"] += parts.has_characters
                else:
                    yield Piece(file, parts.number, (Segment(parts.rest),))
                parts.begin_document()

    def where(self, file: int, record: int) -> str:
        """Returns the file, with the number of the document where it holds several."""
        place = "" if self.document_separator is None else f", document {record + 1}"
        return f"{self.files[file]}{place}"


class _Parts:
    """The text of one document after another, cut where the tokens of its pieces are those of the whole.

    Attributes:
        number: of the document.
        rest: of its text, which may go on.
        is_blank: whether nothing but white space has been seen of it.
    """

    def __init__(self) -> None:
        self.number = 0
        self.rest, self.is_blank = "", True

    def begin_document(self) -> None:
        self.number += 1
        self.rest, self.is_blank = "", True

    @property
    def has_characters(self) -> bool:
        return bool(self.rest)

    def add(self, text: str, ends: bool) -> Sequence[str]:
        """Appends text; returns the pieces that no further text changes, and keeps at least the last one."""
        self.rest += text
        self.is_blank = self.is_blank and not text.strip()
        if self.is_blank:
            # A document of white space is left out. Before text, no one misses more than this.
            self.rest = self.rest[:MAX_CHUNK_CHARACTERS]
            return []
        *pieces, self.rest = chunks(self.rest, PIECE_CHARACTERS)
        return pieces


def split_documents(blocks: Iterable[str], document_separator: int | None) -> Iterator[tuple[str, bool]]:
    """Yields the text of documents in parts, each with whether the document ends there.

    Args:
        blocks: the text, cut anywhere.
        document_separator: blank lines (or more) that end a document; None makes the text one document.
    """
    if document_separator is None:
        for block in blocks:
            yield block, False
        yield "", True
        return
    separator = re.compile(rf"\n(?:[ \t\r]*\n){{{document_separator},}}")
    held = ""
    for block in blocks:
        text = held + block
        # White space at the end may be the beginning of a separator that goes on in the next block.
        end = len(text.rstrip(_BLANK))
        if len(text) - end > MAX_CHUNK_CHARACTERS:
            end = len(text)
        held = text[end:]
        *complete, last = separator.split(text[:end])
        for document in complete:
            yield document, True
        yield last, False
    *complete, last = separator.split(held)
    for document in complete:
        yield document, True
    yield last, True
