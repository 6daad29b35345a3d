"""Statements: short documents whose answer is known, each tokenised once and stored in one flat array.

A training sample is a list of statement ids; the batch is gathered from the flat array by index arithmetic, so that
making a batch costs the same few NumPy calls for any number of rows.

Letters: B rows, T columns, S statements in a batch, N tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pkm_lightning.data.batch import NO_TARGET, Batch, filler, to_batch, token_dtype
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
        # A worker started by spawn opens the files itself instead of receiving a copy of them.
        return StatementStore, (self.folder,)

    def tokens_of(self, statement: int) -> list[int]:
        """All tokens of one statement, the final one included."""
        tokens: list[int] = self.tokens[self.offsets[statement] : self.offsets[statement + 1]].tolist()
        return tokens

    def require_fit(self, seq_len: int) -> None:
        """Refuse a row width that cannot hold the longest statement.

        Raises:
            ConfigError: naming data.seq_len and the width needed.
        """
        longest = int(self.lengths.max())
        if longest > seq_len:
            raise ConfigError(
                f"data.seq_len={seq_len} is too short for the longest statement; set data.seq_len={longest} or more."
            )


def write_statements(
    folder: Path, token_lists: Iterable[list[int]], answer_starts: Iterable[int], vocab_size: int
) -> None:
    """Store statements in `folder` as three arrays.

    Args:
        folder: where `StatementStore` will look for them.
        token_lists: the tokens of each statement, at least 2.
        answer_starts: for each statement the index of the first token that belongs to its answer.
        vocab_size: decides between 16 and 32 bits a token.
    """
    arrays = [np.asarray(tokens, dtype=token_dtype(vocab_size)) for tokens in token_lists]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    np.save(folder / "tokens.npy", np.concatenate(arrays))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "answer_starts.npy", np.fromiter(answer_starts, dtype=np.int32))


class StatementRows:
    """Row source over a `StatementStore`; a row key is an array of statement ids.

    Args:
        store: the statements.
        width: T of every batch; None pads to the longest row of the batch, rounded up to 8.
        answer_only: loss on the answer and the end token, else on all tokens.
        pad_id: the token at padded positions.
    """

    def __init__(self, store: StatementStore, *, width: int | None, answer_only: bool, pad_id: int) -> None:
        self._store = store
        self._width = width
        self._answer_only = answer_only
        self._pad_id = pad_id

    def __getitems__(self, keys: list[np.ndarray]) -> Batch:
        """Rows of whole statements; doc_ids counts the statements of a row, no label crosses from one to the next."""
        if not keys:
            return filler(self._width or 8, self._pad_id)
        store = self._store
        ids_S = np.concatenate(keys)
        len_S = store.lengths[ids_S]
        per_row_B = np.asarray([len(key) for key in keys])
        row_S = np.repeat(np.arange(len(keys)), per_row_B)
        first_B = np.cumsum(per_row_B) - per_row_B
        begin_S = np.cumsum(len_S) - len_S
        column_S = begin_S - begin_S[first_B][row_S]
        width = self._width or -(-int((column_S + len_S).max()) // 8) * 8

        within_N = np.arange(int(len_S.sum())) - np.repeat(begin_S, len_S)
        source_N = np.repeat(store.offsets[ids_S], len_S) + within_N
        place = np.repeat(row_S, len_S), np.repeat(column_S, len_S) + within_N
        target_N = store.tokens[source_N + 1].astype(np.int64)
        if self._answer_only:
            target_N[within_N + 1 < np.repeat(store.answer_starts[ids_S], len_S)] = NO_TARGET

        shape = (len(keys), width)
        input_BT = np.full(shape, self._pad_id, dtype=np.int64)
        labels_BT = np.full(shape, NO_TARGET, dtype=np.int64)
        docs_BT = np.full(shape, -1, dtype=np.int64)
        input_BT[place] = store.tokens[source_N]
        labels_BT[place] = target_N
        docs_BT[place] = np.repeat(np.arange(len(ids_S)) - first_B[row_S], len_S)
        return to_batch(input_BT, labels_BT, docs_BT)
