"""`data=hf data.path=...`: datasets of Hugging Face, as files of columns on disk or as names on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkm_lightning.data.readers.hf import DatasetReader, dataset_reader
from pkm_lightning.data.record_datamodule import RecordDataModule
from pkm_lightning.data.sharded import PATH_KEYS
from pkm_lightning.errors import ConfigError, check_integer

__all__ = ["HfDataModule"]


class HfDataModule(RecordDataModule):
    """Rows of Parquet, Arrow, CSV and JSON files, of folders of `save_to_disk`, or of a dataset on the hub.

    Args:
        path: a file, a directory, a glob, or a list of them; or the name of a dataset on the hub.
        val_path, test_path: the same for rows that only validate or test; None takes a share of the rows of `path`,
            or `path` itself where `val_split` or `test_split` names another split of it.
        name: of the configuration of a dataset on the hub; None for the only one.
        split: of a dataset, or of a directory whose files name their splits.
        val_split, test_split: of the rows that validate or test; None for `split`.
        streaming: whether rows of the hub are read from the network instead of being copied to disk first.
        limit: rows that are read per part; None for all.
        options: see `RecordDataModule`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for rows that are missing or malformed; names file and row.
    """

    kind = "hf"

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None,
        test_path: str | Sequence[str] | None,
        name: str | None,
        split: str,
        val_split: str | None,
        test_split: str | None,
        streaming: bool,
        limit: int | None,
        **options: Any,
    ) -> None:
        val_path = path if val_path is None and val_split not in (None, split) else val_path
        test_path = path if test_path is None and test_split not in (None, split) else test_path
        super().__init__(path=path, val_path=val_path, test_path=test_path, **options)
        if limit is not None:
            check_integer("data.limit", limit, low=1)
        for key, word in (("data.split", split), ("data.val_split", val_split), ("data.test_split", test_split)):
            if word is not None and not word.strip():
                raise ConfigError(f"{key}={word!r} names no split; set one, such as train.")
        self.name, self.streaming, self.limit = name, streaming, limit
        self.splits_of_parts = {"train": split, "validation": val_split or split, "test": test_split or split}

    def reading(self) -> dict[str, Any]:
        """Returns fields, template, configuration, splits and limit."""
        return {**super().reading(), "name": self.name, "splits": self.splits_of_parts, "limit": self.limit}

    def reader(self, path: str | Sequence[str], part: str) -> DatasetReader:
        """Returns the rows of a part."""
        others = [self.splits_of_parts[other] for other, shared in self._paths().items() if shared == self.path]
        return dataset_reader(
            path,
            name=self.name,
            streaming=self.streaming,
            split=self.splits_of_parts[part],
            elsewhere=None if part != "train" and path == self.path else others,
            limit=self.limit,
            fields=self.fields,
            renderer=self.renderer(),
            key=PATH_KEYS[part],
        )
