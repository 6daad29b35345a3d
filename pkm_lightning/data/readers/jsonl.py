"""JSON Lines as documents: one object per line, plain or compressed, read line by line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.record_reader import RecordReader
from pkm_lightning.data.readers.records import read_records
from pkm_lightning.data.template_renderer import TemplateRenderer

__all__ = ["JsonlReader"]


class JsonlReader(RecordReader):
    """Records of .jsonl files; the number of a record is that of its line, from 0.

    Args:
        path: a file, a directory, a glob, or a list of them.
        endings: of the files that are read in a directory.
        fields: names of the fields.
        renderer: of conversations.
        key: that `path` is the value of.

    Raises:
        DataError: an entry of `path` does not exist or matches nothing.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        endings: Sequence[str],
        fields: Fields,
        renderer: TemplateRenderer,
        key: str = "data.path",
    ) -> None:
        super().__init__(path, endings=endings, key=key, fields=fields, renderer=renderer)

    def present(self, file: int) -> Collection[str] | None:
        """Returns the fields of the first record of a file; None where it has no record."""
        return next((record.keys() for _, record in read_records(self.files[file])), None)

    def records(self, file: int, names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the records of a file with the numbers of their lines, from 0."""
        for line, record in read_records(self.files[file], self.advance):
            yield line - 1, record

    def where(self, file: int, record: int) -> str:
        """Returns `file:line`."""
        return f"{self.files[file]}:{record + 1}"
