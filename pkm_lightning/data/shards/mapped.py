"""One part of tokenised text as one long array of tokens over its shards, which are mapped when they are read.

Letters: P spans asked for, M their tokens laid end to end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkm_lightning.data.shards.format import INDEX, ShardInfo, token_type
from pkm_lightning.errors import DataError

__all__ = ["TokenShards", "read_index"]

#: Shards that are mapped at a time, per part and process. Mapped files are not open, so their number is no matter.
MAPPED_SHARDS = 1024


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the content of `shards.json`: vocab_size, the shards of each part, and what was read and skipped."""
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index


class TokenShards:
    """The tokens of one part.

    Args:
        folder: a complete folder of shards.
        parts: names of the part, or of several that are read as one; one without documents has no shards.
    """

    def __init__(self, folder: Path, *parts: str) -> None:
        self.folder, self.parts = folder, parts
        index = read_index(folder)
        self.shards = [ShardInfo(**shard) for part in parts for shard in index["parts"].get(part, [])]
        self._type = {2: torch.uint16, 4: torch.uint32}[token_type(index["vocab_size"]).itemsize]
        self._starts = np.concatenate([[0], np.cumsum([s.tokens for s in self.shards], dtype=np.int64)])
        #: Whether every token is a target.
        self.all_learned = all(shard.targets == shard.tokens for shard in self.shards)
        self._mapped = lru_cache(MAPPED_SHARDS)(self._map)
        self._mapped_begins = lru_cache(MAPPED_SHARDS)(self._map_begins)

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Any, ...]]:
        # A worker started by spawn opens the files instead of receiving a copy of their content.
        return TokenShards, (self.folder, *self.parts)

    @property
    def n_tokens(self) -> int:
        """Tokens of the part."""
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        """Documents of the part."""
        return sum(shard.documents for shard in self.shards)

    def identity(self) -> str:
        """Returns a hash of the folder's content and of the parts read."""
        manifest = (self.folder / "manifest.json").read_bytes()
        return hashlib.sha256(b"%s %s" % (manifest, " ".join(self.parts).encode())).hexdigest()

    def spans(self, begin_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
        """Returns the tokens of some spans, laid end to end, as int64 (M,).

        Args:
            begin_P: where each span begins, in tokens from the start of the part.
            length_P: tokens of each span, which may go on in the next shard.
        """
        # A slice per span: gathering single tokens by index costs ten times as much.
        tokens_M = np.empty(int(length_P.sum()), dtype=np.int64)
        for shard, begin, end, place in self._slices(begin_P, length_P):
            tokens_M[place : place + end - begin] = self._mapped(shard)[0][begin:end]
        return tokens_M

    def learned_spans(self, begin_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
        """Returns whether the tokens of some spans are targets, bool (M,); see `spans`."""
        learned_M = np.ones(int(length_P.sum()), dtype=np.bool_)
        if self.all_learned:
            return learned_M
        for shard, begin, end, place in self._slices(begin_P, length_P):
            packed = self._mapped(shard)[1]
            if packed is not None:
                bits = np.unpackbits(packed[begin >> 3 : (end + 7) >> 3], bitorder="little")
                learned_M[place : place + end - begin] = bits[begin & 7 :][: end - begin]
        return learned_M

    def begins_in(self, begin_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
        """Returns whether a document begins with each token of some spans, bool (M,); see `spans`."""
        begins_M = np.zeros(int(length_P.sum()), dtype=np.bool_)
        for shard, begin, end, place in self._slices(begin_P, length_P):
            begins = self._mapped_begins(shard)
            first, last = np.searchsorted(begins, (begin, end))
            begins_M[place - begin + begins[first:last]] = True
        return begins_M

    def begins(self, shard: int) -> np.ndarray:
        """Returns where the documents that begin in a shard begin, in tokens from the start of the part.

        Raises:
            DataError: they are not in order, or not in the shard.
        """
        info = self.shards[shard]
        begins = self._read(info, "begins", np.int64)
        if len(begins) and not (begins[0] >= 0 and (np.diff(begins) > 0).all() and begins[-1] < info.tokens):
            raise DataError(f"{self.folder / info.name}.begins is damaged: its documents are not in order.")
        return begins + self._starts[shard]

    def places(self, shard: int) -> np.ndarray:
        """Returns file and record of these documents, int32 (documents, 2)."""
        return self._read(self.shards[shard], "places", np.int32).reshape(-1, 2)

    def _slices(self, begin_P: np.ndarray, length_P: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """Yields shard, first and last place in it (exclusive), and place among the M tokens."""
        shard_P = np.searchsorted(self._starts, begin_P, side="right") - 1
        local_P, size_P = begin_P - self._starts[shard_P], np.diff(self._starts)[shard_P]
        place = 0
        for shard, begin, length, size in zip(*(a.tolist() for a in (shard_P, local_P, length_P, size_P)), strict=True):
            while begin + length > size:
                yield shard, begin, size, place
                place, length = place + size - begin, length - size + begin
                shard, begin = shard + 1, 0
                size = self.shards[shard].tokens
            yield shard, begin, begin + length, place
            place += length

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        info = self.shards[shard]
        path = self.folder / info.name
        tokens = _map_file(path.with_suffix(".tokens"), self._type, info.tokens)
        if info.targets == info.tokens:
            return tokens, None
        return tokens, _map_file(path.with_suffix(".learned"), torch.uint8, -(-info.tokens // 8))

    def _map_begins(self, shard: int) -> np.ndarray:
        info = self.shards[shard]
        return _map_file((self.folder / info.name).with_suffix(".begins"), torch.int64, info.documents)

    def _read(self, info: ShardInfo, ending: str, dtype: Any) -> np.ndarray:
        return np.fromfile((self.folder / info.name).with_suffix(f".{ending}"), dtype=dtype)


def _map_file(path: Path, dtype: torch.dtype, size: int) -> np.ndarray:
    # NumPy and Python keep a descriptor per mapped file, and a mixture of many large sources has more files than a
    # process may open. An empty file cannot be mapped.
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return np.asarray(mapped.numpy())
