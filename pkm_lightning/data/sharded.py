"""Data modules over shards of tokenised text: those that build them from files of the user's, and those that read them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.datamodule import Splits, TokenDataModule, TokenOptions
from pkm_lightning.data.documents import Reader
from pkm_lightning.data.files import check_paths
from pkm_lightning.data.split import Fractions
from pkm_lightning.errors import ConfigError, check_choice, check_range

PACKINGS = ["windows", "documents", "none"]


class ShardedDataModule(TokenDataModule):
    """Base of data sources whose prepared data are shards.

    Args:
        packing: `windows` cuts the documents, laid end to end, into sequences of `seq_len`; `documents` fills sequences
            with whole documents, of which only those longer than a sequence are cut; `none` makes each document a
            sequence, padded to the longest of its batch.
        options: see `TokenOptions`.
    """

    def __init__(self, *, packing: str, **options: Unpack[TokenOptions]) -> None:
        super().__init__(**options)
        check_choice("data.packing", packing, PACKINGS)
        self.packing = packing

    def view(self) -> dict[str, Any]:
        """Returns sequence length and packing."""
        return {"seq_len": self.seq_len, "packing": self.packing}

    def load(self, folder: Path) -> Splits:
        """Opens the shards.

        Raises:
            DataError: a part holds less than one sequence.
        """
        raise NotImplementedError


class CorpusDataModule(ShardedDataModule):
    """Base of data sources over files of the user's, which are tokenised once into shards.

    Args:
        path: a file, a directory (searched at any depth for `suffixes`), a glob, or a list of them.
        val_path, test_path: the same for files that only validate or test; None takes a share of the documents of `path`.
        val_fraction: share of the documents that is held out for validation, 0.001 to 0.5; no effect with `val_path`.
        test_fraction: likewise for testing, 0 to 0.5; 0 without `test_path`: the validation part is tested.
        seed: decides which documents are held out.
        packing, options: see `ShardedDataModule`.

    Raises:
        ConfigError: for a value out of range.
    """

    #: Endings of the files that are read in a directory, without those of compression.
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None,
        test_path: str | Sequence[str] | None,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        packing: str,
        **options: Unpack[TokenOptions],
    ) -> None:
        super().__init__(packing=packing, **options)
        check_paths("data.path", path)
        for key, other in (("data.val_path", val_path), ("data.test_path", test_path)):
            if other is not None:
                check_paths(key, other)
        check_range("data.val_fraction", val_fraction, low=0.001, high=0.5)
        check_range("data.test_fraction", test_fraction, low=0, high=0.5)
        check_range("data.seed", seed, low=0)
        if test_path is not None and test_fraction:
            raise ConfigError(f"data.test_fraction={test_fraction} and data.test_path={test_path}: set one of them.")
        self.path = path if isinstance(path, str) else tuple(path)
        self.val_path, self.test_path = val_path, test_path
        self.fractions = Fractions(val_fraction, test_fraction, seed)

    @abstractmethod
    def reader(self, path: str | Sequence[str]) -> Reader:
        """Returns the documents of some files; finds them, and reads nothing yet."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """Returns the arguments that decide which documents the files hold; part of the cache key."""

    def cache_key(self) -> CacheKey:
        """Returns the state of the files, how they are read and split, and the tokenizer."""
        raise NotImplementedError

    def build(self, folder: Path) -> list[Source]:
        """Tokenises the files into shards, after training the tokenizer on the training part where it is trained."""
        raise NotImplementedError
