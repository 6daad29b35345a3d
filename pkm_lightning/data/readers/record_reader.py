"""The part of a reader of records that does not depend on the format: their kind, and the template of conversations."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from pkm_lightning.data.documents import Piece
from pkm_lightning.data.readers.fields import Fields, Kind, record_segments
from pkm_lightning.data.readers.file_reader import FileReader
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import DataError

__all__ = ["RecordReader"]


class RecordReader(FileReader):
    """Base of readers of records; the first record decides which fields all of them must have.

    Args:
        path: a file, a directory, a glob, or a list of them.
        endings: of the files that are read in a directory, without those of compression.
        key: that `path` is the value of.
        fields: names of the fields.
        renderer: of conversations.

    Raises:
        DataError: an entry of `path` does not exist or matches nothing.
    """

    def __init__(
        self, path: str | Sequence[str], *, endings: Sequence[str], key: str, fields: Fields, renderer: TemplateRenderer
    ) -> None:
        super().__init__(path, endings=endings, key=key)
        self.fields, self.renderer = fields, renderer

    @cached_property
    def kind(self) -> Kind:
        """What all records are.

        Raises:
            DataError: there is no record.
        """
        for file in range(len(self.files)):
            present = self.present(file)
            if present is not None:
                return self.fields.kind(present)
        raise DataError(f"{self.key}={self.path} is empty; {self.remedy}.")

    #: What to do where there is no record.
    remedy = "write one JSON object per line"

    @abstractmethod
    def present(self, file: int) -> Collection[str] | None:
        """Returns the fields of the first record of a file; None where it has no record."""

    @abstractmethod
    def records(self, file: int, names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the records of a file with their numbers; of the fields only `names` need to be read."""

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Yields the records from file `first_file` on, each as one piece.

        Raises:
            DataError: a record that is malformed; names file and line or row.
        """
        try:
            yield from super().pieces(first_file)
        finally:
            self.renderer.close()

    def read(self, file: int, left_out: Counter[str]) -> Iterator[Piece]:
        """Yields the records of a file."""
        kept = self._kept(file, left_out) if self.fields.skip_nulls else self.records(file, self.fields.of(self.kind))
        records = ((n, self.where(file, n), record) for n, record in kept)
        present = partial(self.present, file)
        for number, segments in record_segments(records, self.kind, self.fields, self.renderer, present):
            yield Piece(file, number, segments)

    def _kept(self, file: int, left_out: Counter[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the records of a file that have no null in a field that is read."""
        names = self.fields.of(self.kind)
        for number, record in self.records(file, names):
            if any(name in record and record[name] is None for name in names):
                left_out["records with null"] += 1
            else:
                yield number, record
