"""Data sources made from the user's own files: which files, and which share of them is held out for validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Unpack

from lightning.pytorch.utilities import rank_zero_only

from pkm_lightning.data.cache import Source, sha256_file
from pkm_lightning.data.datamodule import TokenDataModule, TokenOptions
from pkm_lightning.data.files import check_paths, find_files, shown_endings, skipped_files
from pkm_lightning.errors import check_range

log = logging.getLogger(__name__)


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

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache folder; before training it also logs what the data are."""
        super().setup(stage)
        if stage == "fit":
            self._log_content()

    @rank_zero_only
    def _log_content(self) -> None:
        files = self.files()
        size = sum(file.stat().st_size for file in files)
        others = skipped_files(self.path, self.suffixes)
        skipped = f"; skipped {others.total()} of other endings ({shown_endings(others)})" if others else ""
        log.info("data.path=%s: %s, %s%s", self.path, counted(len(files), "file"), counted(size, "byte"), skipped)
        if self.splits.tokens:
            sequences = (self.splits.order.size(0), len(self.splits.validation_keys))
            pairs = zip(("training", "validation"), self.splits.tokens, sequences, strict=True)
            log.info(", ".join(f"{n:,} tokens in {counted(m, 'sequence')} for {part}" for part, n, m in pairs))

    def log_split(self, documents: int, noun: str, held_out: str) -> None:
        """Logs how many documents a build has read, and what is held out, such as `3 are`."""
        log.info("data.path=%s: %s; %s held out for validation", self.path, counted(documents, noun), held_out)

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


def counted(n: int, noun: str) -> str:
    """Returns a number with its noun, such as `1 file` or `1,000 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
