"""`data=tokens data.path=FOLDER`: tokens that `prepare data=... out=FOLDER` has written, read where they lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Unpack

from pkm_lightning.data.cache import read_manifest
from pkm_lightning.data.datamodule import LoaderOptions, Splits
from pkm_lightning.data.files import check_paths, expanded
from pkm_lightning.data.sharded import ShardedDataModule, refuse_windows
from pkm_lightning.data.shards.folder import (
    check_folder,
    check_same_tokenizer,
    default_packing,
    holds_conversations,
    require_folder,
)
from pkm_lightning.data.shards.format import PARTS
from pkm_lightning.data.shards.mapped import TokenShards, read_index
from pkm_lightning.errors import DataError

__all__ = ["TokensDataModule"]

#: The keys of folders that hold one part alone.
KEYS = {"validation": "data.val_path", "test": "data.test_path"}


class TokensDataModule(ShardedDataModule):
    """A folder of shards, with the tokenizer in it; nothing is copied, and no text is read.

    Args:
        path: the folder.
        val_path, test_path: further folders, of the same tokenizer, whose documents all validate or test; None: the
            parts of `path`.
        packing: see `ShardedDataModule`; None: that of the data source which the folder was prepared from.
        options: see `LoaderOptions`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data` and `vocab_size`, for a folder that is missing, foreign, damaged, or of another
            tokenizer.
    """

    #: What names `path` in messages, and what to do where it has no validation part.
    key = "data.path"
    without_validation = "set data.val_path to a prepared folder whose documents validate"

    builds = False

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None,
        test_path: str | None,
        packing: str | None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        for key, value in (("path", path), ("val_path", val_path), ("test_path", test_path)):
            if value is not None:
                check_paths(f"data.{key}", value)
        # Both are those of the folder.
        super().__init__(packing=packing, tokenizer=str(expanded(path) / "tokenizer.json"), vocab_size=0, **options)
        self.path = expanded(path)
        self.own_paths = {
            part: expanded(other)
            for part, other in (("validation", val_path), ("test", test_path))
            if other is not None
        }

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model must provide for."""
        # Before it is compared with its hashes, which takes time: `info` asks too.
        require_folder(self.path, self.key)
        return int(read_index(self.path)["vocab_size"])

    def prepared_sources(self) -> list[dict[str, Any]]:
        """Returns the names and licences of what the folder was made from."""
        sources: list[dict[str, Any]] = read_manifest(self.path)["sources"]
        return sources

    def cache_folder(self) -> Path:
        """Returns the folder that `path` names, once it and the others are checked.

        Raises:
            ConfigError: conversations would be cut anywhere.
            DataError: one is missing, foreign, damaged, or of another tokenizer.
        """
        if self._folder is None:
            check_folder(self.path, self.key)
            for part, folder in self.own_paths.items():
                check_folder(folder, KEYS[part])
                check_same_tokenizer(self.path, self.key, folder, KEYS[part])
            self.packing = self.packing or default_packing(self.path)
            for part, folder in {"train": self.path, **self.own_paths}.items():
                if self.packing == "windows" and holds_conversations(folder):
                    refuse_windows(self.place(part))
            self._folder = self.path
        return self._folder

    @property
    def fingerprint(self) -> str:
        """sha256 of the shards, their sources, and the arguments, but not of the order."""
        manifests = {
            part: read_manifest(folder) for part, folder in {"": self.cache_folder(), **self.own_paths}.items()
        }
        content = {
            part: {"sources": manifest["sources"], "files": manifest["files"]} for part, manifest in manifests.items()
        }
        # Alone it is that of the data source which the folder was prepared from.
        whole: dict[str, Any] = {**content.pop(""), "view": self.view(), **content}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def load(self, folder: Path) -> Splits:
        """Opens the shards.

        Raises:
            ConfigError: a prompt with its answer is longer than a sequence; names its place and the length needed.
            DataError: a part holds less than one sequence.
        """
        parts = {part: TokenShards(folder, part) for part in PARTS}
        # Whoever prepared it has split it too; here all of it is held out.
        parts |= {part: TokenShards(other, *PARTS) for part, other in self.own_paths.items()}
        if not parts["validation"].n_tokens:
            raise DataError(f"{self.place('validation')} has no validation part; {self.without_validation}.")
        return self.open_parts(parts, folder)

    def place(self, part: str) -> str:
        """Returns the key and value that name the folder of a part."""
        return f"{KEYS[part]}={self.own_paths[part]}" if part in self.own_paths else f"{self.key}={self.path}"

    def questions_folder(self) -> Path:
        """Returns the folder whose validation part is asked about."""
        return self.own_paths.get("validation", self.cache_folder())
