"""One part of tokenised text as one long array of tokens over its shards, which are mapped when they are read.

Letters: M tokens asked for.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pkm_lightning.data.shards.format import INDEX, ShardInfo, token_type

__all__ = ["TokenShards", "read_index"]

#: Shards whose files are open at a time, per part and process.
OPEN_SHARDS = 64


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the content of `shards.json`: vocab_size, the shards of each part, and what was read and skipped."""
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index


class TokenShards:
    """The tokens of one part.

    Args:
        folder: a complete folder of shards.
        part: `train`, `validation` or `test`; one without documents has no shards.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        index = read_index(folder)
        self.shards = [ShardInfo(**shard) for shard in index["parts"].get(part, [])]
        self._type = token_type(index["vocab_size"])
        self._starts = np.concatenate([[0], np.cumsum([s.tokens for s in self.shards], dtype=np.int64)]).astype(
            np.int64
        )
        self._mapped = lru_cache(OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Path, str]]:
        # A worker started by spawn opens the files instead of receiving a copy of their content.
        return TokenShards, (self.folder, self.part)

    @property
    def n_tokens(self) -> int:
        """Tokens of the part."""
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        """Documents of the part."""
        return sum(shard.documents for shard in self.shards)

    @property
    def all_learned(self) -> bool:
        """Whether every token is a target."""
        return all(shard.targets == shard.tokens for shard in self.shards)

    def tokens(self, positions_M: np.ndarray) -> np.ndarray:
        """Returns the tokens at some positions of the part, of any shape, as int64."""
        return self._gather(positions_M, "tokens").astype(np.int64)

    def learned(self, positions_M: np.ndarray) -> np.ndarray:
        """Returns whether the tokens at some positions are targets (bool)."""
        return self._gather(positions_M, "learned").astype(np.bool_)

    def begins(self, shard: int) -> np.ndarray:
        """Returns where the documents that begin in a shard begin, in tokens from the start of the part."""
        return self._read(self.shards[shard], "begins", np.int64) + self._starts[shard]

    def places(self, shard: int) -> np.ndarray:
        """Returns file and record of these documents, int32 (documents, 2)."""
        return self._read(self.shards[shard], "places", np.int32).reshape(-1, 2)

    def _gather(self, positions: np.ndarray, kind: str) -> np.ndarray:
        flat = np.asarray(positions, dtype=np.int64).reshape(-1)
        shard_M = np.searchsorted(self._starts, flat, side="right") - 1
        values = np.empty(len(flat), dtype=np.int64)
        for shard in np.unique(shard_M):
            here = shard_M == shard
            values[here] = self._values(int(shard), flat[here] - self._starts[shard], kind)
        return values.reshape(np.shape(positions))

    def _values(self, shard: int, local_M: np.ndarray, kind: str) -> np.ndarray:
        tokens, learned = self._mapped(shard)
        if kind == "tokens":
            return tokens[local_M]
        if learned is None:
            return np.ones(len(local_M), dtype=np.int64)
        return learned[local_M >> 3] >> (local_M & 7) & 1

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        info = self.shards[shard]
        path = self.folder / info.name
        tokens = np.memmap(path.with_suffix(".tokens"), dtype=self._type, mode="r", shape=(info.tokens,))
        if info.targets == info.tokens:
            return tokens, None
        return tokens, np.memmap(path.with_suffix(".learned"), dtype=np.uint8, mode="r")

    def _read(self, info: ShardInfo, ending: str, dtype: Any) -> np.ndarray:
        return np.fromfile((self.folder / info.name).with_suffix(f".{ending}"), dtype=dtype)
