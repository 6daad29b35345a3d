"""`data=text data.path=...`: UTF-8 text as training data, cut into windows of `seq_len` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkm_lightning.data.readers.text import TextReader
from pkm_lightning.data.sharded import PATH_KEYS, CorpusDataModule, check_endings
from pkm_lightning.errors import check_range

__all__ = ["TextDataModule"]


class TextDataModule(CorpusDataModule):
    """Documents of text files, plain or compressed.

    Args:
        path: see `CorpusDataModule`.
        document_separator: blank lines (or more) that end a document; None makes each file one document.
        endings: of the files that are read in a directory, without those of compression.
        options: see `CorpusDataModule`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for text that is missing, empty, not UTF-8 or too short.
    """

    kind = "text"

    def __init__(
        self, *, path: str | Sequence[str], document_separator: int | None, endings: Sequence[str], **options: Any
    ) -> None:
        super().__init__(path=path, **options)
        if document_separator is not None:
            check_range("data.document_separator", document_separator, low=1)
        check_endings(endings)
        self.document_separator, self.endings = document_separator, tuple(endings)

    def reader(self, path: str | Sequence[str], part: str) -> TextReader:
        """Returns the documents of a part."""
        return TextReader(path, endings=self.endings, document_separator=self.document_separator, key=PATH_KEYS[part])

    def reading(self) -> dict[str, Any]:
        """Returns what separates documents."""
        return {"document_separator": self.document_separator}
