"""`data=jsonl data.path=...`: one record per line: a text, a prompt with its answer, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkm_lightning.data.readers.jsonl import JsonlReader
from pkm_lightning.data.record_datamodule import RecordDataModule
from pkm_lightning.data.sharded import PATH_KEYS, check_endings

__all__ = ["JsonlDataModule"]


class JsonlDataModule(RecordDataModule):
    """Records of JSON lines, plain or compressed.

    Args:
        path: see `CorpusDataModule`.
        endings: of the files that are read in a directory, without those of compression.
        options: see `RecordDataModule`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for records that are missing or malformed; names file and line.
    """

    kind = "jsonl"

    def __init__(self, *, path: str | Sequence[str], endings: Sequence[str], **options: Any) -> None:
        super().__init__(path=path, **options)
        check_endings(endings)
        self.endings = tuple(endings)

    def reader(self, path: str | Sequence[str], part: str) -> JsonlReader:
        """Returns the records of a part."""
        return JsonlReader(
            path, endings=self.endings, fields=self.fields, renderer=self.renderer(), key=PATH_KEYS[part]
        )
