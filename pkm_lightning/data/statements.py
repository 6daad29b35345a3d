"""Statements: short documents whose answer is known, each tokenised once and stored in one flat array.

A training sequence is a list of statement ids; the batch is gathered from the flat array by index arithmetic, so that
making a batch costs the same few NumPy calls for any number of sequences.

Letters: P statements in a batch, M their input tokens laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.data.batch import WIDTH_STEP, filler, packed_batch, token_dtype
from pkm_lightning.errors import ConfigError


class StatementStore:
    """Memory-mapped statements of a cache folder.

    `lengths` counts inputs: the last token of a statement is only ever a label, so n tokens make n - 1 inputs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")
        self.answer_starts: np.ndarray = np.load(folder / "answer_starts.npy")
        self.lengths: np.ndarray = np.diff(self.offsets) - 1

    def __reduce__(self) -> tuple[type[StatementStore], tuple[Path]]:
        # A worker started by spawn opens the files instead of receiving a copy of their content.
        return StatementStore, (self.folder,)

    def tokens_of(self, statement: int) -> list[int]:
        """Returns all tokens of one statement, the end token included."""
        tokens: list[int] = self.tokens[self.offsets[statement] : self.offsets[statement + 1]].tolist()
        return tokens

    def require_fit(self, seq_len: int) -> None:
        """Refuses a sequence length that cannot hold the longest statement.

        Raises:
            ConfigError: naming data.seq_len and the length needed.
        """
        longest = int(self.lengths.max())
        if longest > seq_len:
            raise ConfigError(
                f"data.seq_len={seq_len} is too short for the longest statement; set data.seq_len={longest} or more."
            )


def write_statements(
    folder: Path, token_lists: Iterable[list[int]], answer_starts: Iterable[int], vocab_size: int
) -> None:
    """Stores statements in `folder` as three arrays.

    Args:
        folder: the folder that `StatementStore` will open.
        token_lists: the tokens of each statement, at least 2.
        answer_starts: for each statement the index of the first token that belongs to its answer.
        vocab_size: decides between 16 and 32 bits per token.
    """
    arrays = [np.asarray(tokens, dtype=token_dtype(vocab_size)) for tokens in token_lists]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    np.save(folder / "tokens.npy", np.concatenate(arrays))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "answer_starts.npy", np.fromiter(answer_starts, dtype=np.int32))


class StatementSequences:
    """Source of sequences over a `StatementStore`; a key is an array of statement ids.

    Args:
        store: the statements.
        width: T of every batch; None pads to the longest sequence of the batch, rounded up to 8.
        answer_only: loss on the answer and the end token, else on all tokens.
        pad_id: the token at padded positions.
    """

    def __init__(self, store: StatementStore, *, width: int | None, answer_only: bool, pad_id: int) -> None:
        self._store = store
        self._width = width
        self._answer_only = answer_only
        self._pad_id = pad_id

    def __getitems__(self, keys: list[np.ndarray]) -> Batch:
        """Returns whole statements per sequence; doc_ids counts them, no label crosses from one to the next."""
        if not keys:
            return filler(self._width or WIDTH_STEP, self._pad_id)
        store = self._store
        ids_P = np.concatenate(keys)
        len_P = store.lengths[ids_P]
        within_M = np.arange(int(len_P.sum())) - np.repeat(np.cumsum(len_P) - len_P, len_P)
        source_M = np.repeat(store.offsets[ids_P], len_P) + within_M
        target_M = store.tokens[source_M + 1].astype(np.int64)
        if self._answer_only:
            target_M[within_M + 1 < np.repeat(store.answer_starts[ids_P], len_P)] = NO_TARGET
        count_B = np.asarray([len(key) for key in keys])
        return packed_batch(count_B, len_P, store.tokens[source_M], target_M, width=self._width, pad_id=self._pad_id)
