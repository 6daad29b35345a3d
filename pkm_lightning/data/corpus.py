"""Data sources made from the user's own files: which files, and which share of them is held out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Unpack

from pkm_lightning.data.cache import Source, sha256_file
from pkm_lightning.data.datamodule import TokenDataModule, TokenOptions
from pkm_lightning.data.files import check_paths, find_files
from pkm_lightning.errors import check_range


class CorpusDataModule(TokenDataModule):
    """Base of data sources over files.

    Args:
        path: a file, a directory (searched at any depth for `suffixes`), a glob, or a list of them.
        val_fraction: share of the documents that is held out for validation, 0.001 to 0.5.
        seed: decides which documents are held out.
        options: see `TokenOptions`.

    Raises:
        ConfigError: for a value out of range.
    """

    #: Endings of the files that are read in a directory.
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(
        self, *, path: str | Sequence[str], val_fraction: float, seed: int, **options: Unpack[TokenOptions]
    ) -> None:
        super().__init__(**options)
        check_paths("data.path", path)
        check_range("data.val_fraction", val_fraction, low=0.001, high=0.5)
        check_range("data.seed", seed, low=0)
        self.path = path if isinstance(path, str) else tuple(path)
        self.val_fraction = val_fraction
        self.seed = seed

    def files(self) -> list[Path]:
        """Returns the files that `path` names.

        Raises:
            ConfigError: if `path` is an empty list.
            DataError: if an entry does not exist or matches nothing.
        """
        return find_files(self.path, self.suffixes)

    def sources(self) -> list[Source]:
        """Returns the manifest's entry for the files, with their hashes."""
        return [Source(str(self.path), files={str(file): sha256_file(file) for file in self.files()})]
