"""Datasets of Hugging Face as documents: local files of any size, and names on the hub where there is a network."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pkm_lightning.data.documents import Piece
from pkm_lightning.data.files import check_paths, expanded
from pkm_lightning.data.readers.dataset_files import OTHER_SPLITS, dataset_files
from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.record_reader import RecordReader
from pkm_lightning.data.readers.tables import TABLE_ENDINGS, columns_of, rows_of, table_kind
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import ConfigError, DataError, missing_extra

__all__ = ["DatasetReader", "HubReader", "dataset_reader"]

#: Seconds until the hub must have answered.
TIMEOUT = 10
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_REMEDY = "set data.text_field, data.prompt_field and data.answer_field, or data.messages_field"


def is_hub_name(path: str | Sequence[str]) -> bool:
    """Returns whether a path can only be the name of a dataset on the hub, such as `org/name`."""
    if not isinstance(path, str) or not _HUB_NAME.fullmatch(path) or os.path.lexists(expanded(path)):
        return False
    return table_kind(Path(path)) not in TABLE_ENDINGS


class DatasetReader(RecordReader):
    """Rows of local files.

    Args:
        path: a file, a directory, a folder of `save_to_disk`, a glob, or a list of them.
        split: of a directory whose files name their splits.
        elsewhere: splits of the directory that other readers read, so that nothing is skipped; None where another
            reader of the same path counts what is.
        limit: documents that are read; None for all.
        fields: names of the columns.
        renderer: of conversations.
        key: that `path` is the value of.

    Raises:
        DataError: an entry of `path` does not exist or holds no such files.
    """

    remedy = "give files with rows"

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        split: str,
        limit: int | None,
        fields: Fields,
        renderer: TemplateRenderer,
        elsewhere: Collection[str] | None = (),
        key: str = "data.path",
    ) -> None:
        super().__init__(path, endings=TABLE_ENDINGS, key=key, fields=fields, renderer=renderer)
        self.split, self.limit, self.elsewhere = split, limit, elsewhere

    @cached_property
    def _listing(self) -> tuple[list[Path], Counter[str]]:
        return dataset_files(self.path, self.split, self.key)

    @cached_property
    def files(self) -> Sequence[Path]:
        """The files that are read."""
        return self._listing[0]

    @cached_property
    def other_files(self) -> Counter[str]:
        """How many files are left out, by reason."""
        if self.elsewhere is None:
            return Counter()
        read = {f"{OTHER_SPLITS} {split}" for split in self.elsewhere}
        return Counter({reason: n for reason, n in self._listing[1].items() if reason not in read})

    def present(self, file: int) -> Collection[str] | None:
        """Returns the columns of a file; None where it has no row."""
        return columns_of(self.files[file])

    def records(self, file: int, names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the rows of a file with their numbers, from 0."""
        yield from enumerate(rows_of(self.files[file], names, self.advance))

    def where(self, file: int, record: int) -> str:
        """Returns the file and the row, counted from 0 as `datasets` and pandas do."""
        return f"{self.files[file]}, row {record}"

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Yields the rows from file `first_file` on, up to `limit` rows in all.

        Raises:
            DataError: a file or a row that is malformed; names both.
        """
        if self.limit is None:
            yield from super().pieces(first_file)
            return
        # The limit counts the rows of earlier files too.
        yield from (piece for piece in islice(super().pieces(0), self.limit) if piece.file >= first_file)


class HubReader(DatasetReader):
    """Rows of a dataset on the hub.

    Args:
        name: of its configuration; None for the only one.
        streaming: whether rows are read from the network; else `datasets` first copies the dataset into its cache.
        path, split, options: see `DatasetReader`.
    """

    def __init__(self, path: str, *, name: str | None, streaming: bool, **options: Any) -> None:
        super().__init__(path, **options)
        self.name, self.streaming = name, streaming

    @cached_property
    def _dataset(self) -> tuple[Any, str]:
        """The dataset and its revision.

        Raises:
            DataError: there is no such dataset, configuration or split, or the hub cannot be reached.
        """
        for package in ("datasets", "huggingface_hub"):
            if importlib.util.find_spec(package) is None:
                raise missing_extra(f"{self.key}={self.path}", package, "data")
        try:
            return _hub_dataset(str(self.path), self.name, self.split, self.streaming)
        except Exception as error:  # of any kind, from the libraries of the network
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return DataError(
            f"{self.key}={self.path} is no file or folder, and as a dataset of the hub it cannot be read with "
            f"data.name={'null' if self.name is None else self.name} data.split={self.split} ({reason:.300}); correct "
            "the path, or save the dataset where there is a network with save_to_disk and give that folder."
        )

    @cached_property
    def _listing(self) -> tuple[list[Path], Counter[str]]:
        name = "" if self.name is None else f"-{self.name}"
        return [Path(f"{self.path}{name}-{self.split}@{self._dataset[1]}")], Counter()

    def present(self, file: int) -> Collection[str] | None:
        """Returns the columns of the dataset; None where it has no row."""
        for row in self._rows(self._dataset[0]):
            return list(row)
        return None

    def records(self, file: int, names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the rows of the dataset with their numbers."""
        present = self.present(file) or names
        for name in names:
            if name not in present:
                raise DataError(
                    f"{self.key}={self.path} has no column '{name}' (columns present: {', '.join(present)}); {_REMEDY}."
                )
        yield from enumerate(self._rows(self._dataset[0].select_columns(list(names))))

    def where(self, file: int, record: int) -> str:
        """Returns the name of the dataset and the row, from 0."""
        return f"{self.path}, row {record}"

    def _rows(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # of any kind, from the network and the readers of formats
            raise self._unreachable(error) from None


# Remembered: several readers of one dataset are made while it is prepared, and the hub is asked once.
@lru_cache(maxsize=8)
def _hub_dataset(path: str, name: str | None, split: str, streaming: bool) -> tuple[Any, str]:
    import datasets
    import huggingface_hub

    revision = None
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        # Asked first: `datasets` tries for half a minute to reach a hub that is out of reach.
        revision = huggingface_hub.HfApi().dataset_info(path, timeout=TIMEOUT).sha
    dataset = datasets.load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    return dataset, str(revision or getattr(dataset, "_fingerprint", "cached"))


def dataset_reader(path: str | Sequence[str], *, name: str | None, streaming: bool, **options: Any) -> DatasetReader:
    """Returns the reader of local files, or of the hub where `path` can only be a name there.

    Args:
        path, options: see `DatasetReader`.
        name, streaming: see `HubReader`.

    Raises:
        ConfigError: `path` names no files, or files although `name` is one of the hub.
    """
    check_paths(options["key"], path)
    if is_hub_name(path):
        return HubReader(str(path), name=name, streaming=streaming, **options)
    if name is not None:
        shown = path if isinstance(path, str) else ", ".join(path)
        raise ConfigError(
            f"data.name={name} is of a dataset on the hub, and {options['key']}={shown} are files; leave it out."
        )
    return DatasetReader(path, **options)
