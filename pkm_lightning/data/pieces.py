"""The pieces of documents that sequences of whole documents are filled with: where each begins and how long it is.

A document of n tokens has n - 1 inputs: its last token is only a label. One with more than T of them goes on in further
pieces, which share a token: the last of a piece is a label, and the first input of the next.

Both are derived from the shards once per T and kept as mapped files, so that no list of the documents is in memory:
`PART.begins` (int64), `PART.lengths` (int32), and `PART.bounds` (int64), the sequences of documents in their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pkm_lightning.data.packing import BLOCK, next_fit
from pkm_lightning.data.shards.mapped import TokenShards
from pkm_lightning.errors import ConfigError

__all__ = ["ConsecutivePieces", "Pieces", "write_pieces"]


class Pieces:
    """The pieces of a part, mapped.

    Attributes:
        begins: (pieces,) where the inputs of each begin, in tokens from the start of the part.
        lengths: (pieces,) inputs of each, from 1 to T.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self._args = (folder, part)
        self.begins = _mapped(folder / f"{part}.begins", np.int64)
        self.lengths = _mapped(folder / f"{part}.lengths", np.int32)

    def __reduce__(self) -> tuple[type[Pieces], tuple[Path, str]]:
        # A worker started by spawn opens the files instead of receiving a copy of their content.
        return Pieces, self._args

    def __len__(self) -> int:
        return len(self.begins)


class ConsecutivePieces(Sequence[np.ndarray]):
    """Keys of sequences that hold the pieces in their own order.

    Args:
        bounds: (sequences + 1,) sequence i holds the pieces from entry i up to, not including, entry i + 1.
    """

    def __init__(self, bounds: np.ndarray) -> None:
        self._bounds = bounds

    @classmethod
    def of(cls, folder: Path, part: str, pieces: Pieces, capacity: int | None) -> ConsecutivePieces:
        """Returns the keys of a part; a capacity of None makes every piece a sequence."""
        return cls(np.arange(len(pieces) + 1) if capacity is None else _mapped(folder / f"{part}.bounds", np.int64))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return np.arange(self._bounds[index], self._bounds[index + 1])


@dataclass(frozen=True)
class _TooLong:
    """The first record that no sequence holds, and the inputs of the longest."""

    part: str
    place: tuple[int, int]
    inputs: int
    longest: int


def write_pieces(
    folder: Path, parts: Mapping[str, TokenShards], seq_len: int, where: Callable[[str, int, int], str]
) -> None:
    """Writes the pieces of several parts.

    Args:
        folder: where the files are written.
        parts: by name.
        seq_len: T.
        where: the place of a document for messages, from its part, file and record.

    Raises:
        ConfigError: a document of which only a part is learned, such as an answer, is longer than T: its pieces would
            lack the prompt.
    """
    too_long: _TooLong | None = None
    for part, shards in parts.items():
        with (folder / f"{part}.begins").open("wb") as begins, (folder / f"{part}.lengths").open("wb") as lengths:
            for shard, begin_P, input_P in _documents(shards):
                if not shards.all_learned:
                    too_long = _longer(too_long, part, shards, shard, begin_P, input_P, seq_len)
                count_P = -(-input_P // seq_len)
                number = np.arange(int(count_P.sum())) - np.repeat(np.cumsum(count_P) - count_P, count_P)
                (np.repeat(begin_P, count_P) + number * seq_len).tofile(begins)
                np.minimum(np.repeat(input_P, count_P) - number * seq_len, seq_len).astype(np.int32).tofile(lengths)
        _write_bounds(folder, part, seq_len)
    if too_long is not None:
        raise ConfigError(
            f"{where(too_long.part, *too_long.place)} needs {too_long.inputs} tokens, data.seq_len={seq_len} is too "
            "short, and a prompt or conversation is never cut from its answer; "
            f"set data.seq_len={too_long.longest} or more, or shorten the record."
        )


def _documents(shards: TokenShards) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields each shard with the first tokens of the documents that begin in it, and their numbers of inputs."""
    # The last document of a shard ends where the next one begins, which may be several shards on.
    waiting: tuple[int, np.ndarray] | None = None
    for shard in range(len(shards.shards)):
        begin_P = shards.begins(shard)
        if not len(begin_P):
            continue
        if waiting is not None:
            yield *waiting, np.diff(waiting[1], append=begin_P[0]) - 1
        waiting = shard, begin_P
    if waiting is not None:
        yield *waiting, np.diff(waiting[1], append=shards.n_tokens) - 1


def _longer(
    known: _TooLong | None,
    part: str,
    shards: TokenShards,
    shard: int,
    begin_P: np.ndarray,
    input_P: np.ndarray,
    seq_len: int,
) -> _TooLong | None:
    for document in np.flatnonzero(input_P > seq_len).tolist():
        inputs = int(input_P[document])
        if shards.learned_spans(begin_P[document : document + 1], np.asarray([inputs + 1])).all():
            continue
        if known is None:
            file, record = shards.places(shard)[document].tolist()
            known = _TooLong(part, (file, record), inputs, inputs)
        known = _TooLong(known.part, known.place, known.inputs, max(known.longest, inputs))
    return known


def _write_bounds(folder: Path, part: str, capacity: int) -> None:
    lengths = _mapped(folder / f"{part}.lengths", np.int32)
    begin, step = 0, max(BLOCK, 2 * capacity)  # two sequences at least
    with (folder / f"{part}.bounds").open("wb") as file:
        while begin < len(lengths):
            bounds = begin + next_fit(lengths[begin : begin + step], capacity)
            # The last sequence may go on in the next block.
            whole = bounds[:-1] if begin + step >= len(lengths) else bounds[:-2]
            whole.tofile(file)
            begin = int(bounds[len(whole)])
        np.asarray([len(lengths)], dtype=np.int64).tofile(file)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype=dtype)
