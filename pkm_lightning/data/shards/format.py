"""The files of tokenised text, and their writer.

A folder holds `tokenizer.json`, `shards.json` and, for shard k of a part (`train`, `validation`, `test`):

| file | content |
|---|---|
| `train-00000.tokens` | token ids, uint16 or uint32; each document ends with the end token |
| `train-00000.begins` | int64: where documents begin that begin in this shard, in tokens from its start |
| `train-00000.places` | int32 (documents, 2): file and record that each of them comes from |
| `train-00000.learned` | one bit per token, least significant first: 1 where the token is a target; absent where all are |

A document may go on in the next shard. The files have no header: sizes and types stand in `shards.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["PARTS", "ShardInfo", "ShardWriter", "token_type"]

PARTS = ("train", "validation", "test")
INDEX = "shards.json"


def token_type(vocab_size: int) -> np.dtype[Any]:
    """Returns the type of the ids in `.tokens`."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a part.

    Attributes:
        name: of its files, without ending.
        tokens, documents: in it; documents are counted where they begin.
        targets: tokens that are learned.
    """

    name: str
    tokens: int
    documents: int
    targets: int


class ShardWriter:
    """Writes one shard; its files are complete after `close`.

    Args:
        folder: where its files are written.
        name: of the files, such as `train-00000`.
        vocab_size: decides the type of the ids.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._path, self.name, self._type = folder / name, name, token_type(vocab_size)
        self._file: BinaryIO = self._path.with_suffix(".tokens").open("wb")
        self.tokens = 0
        self._begins: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._learned: list[np.ndarray] = []
        self._all_learned = True

    def begin_document(self, file: int, record: int) -> None:
        """Notes that a document begins with the next token."""
        self._begins.append(self.tokens)
        self._places.append((file, record))

    def write(self, ids: np.ndarray, *, learned: bool) -> None:
        """Appends tokens of the current document."""
        self._file.write(np.ascontiguousarray(ids, dtype=self._type).tobytes())
        self.tokens += len(ids)
        self._all_learned &= learned
        self._learned.append(np.full(len(ids), learned))

    def close(self) -> ShardInfo:
        """Writes the other files and returns what the shard holds."""
        self._file.close()
        np.asarray(self._begins, dtype=np.int64).tofile(self._path.with_suffix(".begins"))
        np.asarray(self._places, dtype=np.int32).tofile(self._path.with_suffix(".places"))
        targets = self.tokens
        if not self._all_learned:
            learned = np.concatenate(self._learned)
            np.packbits(learned, bitorder="little").tofile(self._path.with_suffix(".learned"))
            targets = int(learned.sum())
        return ShardInfo(self.name, self.tokens, len(self._begins), targets)
