"""The files of tokenised text, and their writer.

A folder holds `tokenizer.json`, `shards.json` and, for shard k of a part (`train`, `validation`, `test`):

| file | content |
|---|---|
| `train-00000.tokens` | token ids, uint16 or uint32; each document ends with the end token |
| `train-00000.begins` | int64: where documents begin that begin in this shard, in tokens from its start |
| `train-00000.places` | int32 (documents, 2): file and record that each of them comes from |
| `train-00000.learned` | a bit per token, least significant first: 1 where it is a target; absent where all are |

A document may go on in the next shard. The files have no header: sizes and types stand in `shards.json`.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pkm_lightning.storage import flush

__all__ = ["PARTS", "ShardInfo", "ShardWriter", "token_type"]

PARTS = ("train", "validation", "test")
INDEX = "shards.json"
#: Tokens whose bits are packed at a time, a multiple of 8.
BLOCK = 2**20
#: Places serve messages: one beyond this number is recorded as this number.
MAX_PLACE = 2**31 - 1


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
    """Writes one shard; its files are complete and on disk after `close`.

    Args:
        folder: where its files are written.
        name: of the files, such as `train-00000`.
        vocab_size: decides the type of the ids.

    Attributes:
        sha256: of the files by their names, after `close`.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._path, self.name, self._type = folder / name, name, token_type(vocab_size)
        self._file = self._path.with_suffix(".tokens").open("wb")
        self._hash = hashlib.sha256()
        self.sha256: dict[str, str] = {}
        self.tokens = 0
        # Arrays and not lists, which would take 100 bytes per document.
        self._begins, self._places = array("q"), array("i")
        # Lengths of runs of tokens that are targets and that are none, in turn; the first may be 0.
        self._runs = array("q", [0])

    def begin_document(self, file: int, record: int) -> None:
        """Records that a document begins with the next token."""
        self._begins.append(self.tokens)
        self._places.extend((min(file, MAX_PLACE), min(record, MAX_PLACE)))

    def write(self, ids: np.ndarray, *, learned: bool) -> None:
        """Appends tokens of the current document."""
        content = np.ascontiguousarray(ids, dtype=self._type).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.tokens += len(ids)
        if len(self._runs) % 2 != learned:
            self._runs.append(0)
        self._runs[-1] += len(ids)

    def close(self) -> ShardInfo:
        """Writes the other files, waits until all are on disk, and returns what the shard holds."""
        self._file.close()
        tokens_path = self._path.with_suffix(".tokens")
        flush(tokens_path)
        self.sha256[tokens_path.name] = self._hash.hexdigest()
        self._write("begins", np.asarray(self._begins, dtype=np.int64).tobytes())
        self._write("places", np.asarray(self._places, dtype=np.int32).tobytes())
        targets = sum(self._runs[::2])
        if targets < self.tokens:
            self._write("learned", _bits(np.asarray(self._runs, dtype=np.int64)))
        return ShardInfo(self.name, self.tokens, len(self._begins), targets)

    def abandon(self) -> None:
        """Closes the file of a shard that will not be completed."""
        self._file.close()

    def _write(self, ending: str, content: bytes) -> None:
        path = self._path.with_suffix(f".{ending}")
        path.write_bytes(content)
        flush(path)
        self.sha256[path.name] = hashlib.sha256(content).hexdigest()


def _bits(runs: np.ndarray) -> bytes:
    """Returns one bit per token, 1 in the first, third, ... of the runs, which have these lengths."""
    ends = np.cumsum(runs)
    packed = []
    for begin in range(0, int(ends[-1]), BLOCK):
        block = min(BLOCK, int(ends[-1]) - begin)
        before, until = np.searchsorted(ends, [begin, begin + block])
        # A run ends between its last token and the next one, and several end there where some are empty.
        changes = np.bincount(ends[before:until] - begin, minlength=block)
        packed.append(np.packbits((np.cumsum(changes) + before) % 2 == 0, bitorder="little").tobytes())
    return b"".join(packed)
