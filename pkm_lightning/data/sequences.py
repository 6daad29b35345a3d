"""Sequences over the tokens of a part: windows side by side, or whole documents.

Letters: B sequences, T tokens; P pieces of documents, M their input tokens laid end to end.
"""

from __future__ import annotations

import numpy as np

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.data.batch import WIDTH_STEP, filler, packed_batch, to_batch
from pkm_lightning.data.pieces import Pieces
from pkm_lightning.data.shards.mapped import TokenShards

__all__ = ["DocumentSequences", "WindowSequences"]


class WindowSequences:
    """Windows of T + 1 tokens over the documents of a part laid end to end; a key is the number of a window.

    The last token of a window is only a label, and the first input of the next. What does not fill a window at the end
    of the part is left out.

    Args:
        shards: the tokens.
        seq_len: T.
        pad_id: the token of fillers.
    """

    def __init__(self, shards: TokenShards, *, seq_len: int, pad_id: int) -> None:
        self._shards, self._seq_len, self._pad_id = shards, seq_len, pad_id

    def __len__(self) -> int:
        return max(0, self._shards.n_tokens - 1) // self._seq_len

    def __getitems__(self, keys: list[int]) -> Batch:
        """Returns whole windows; the first token of a document is no target: it does not follow from the one before."""
        if not keys:
            return filler(self._seq_len, self._pad_id)
        begin_B, length_B = np.asarray(keys) * self._seq_len, np.full(len(keys), self._seq_len + 1)
        tokens = self._shards.spans(begin_B, length_B).reshape(len(keys), -1)
        # Copies, since both are views of `tokens`: a NO_TARGET among the labels would change the inputs.
        input_BT, labels_BT = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        # Not the end tokens, which also end the turns of a conversation.
        is_last_BT = self._shards.begins_in(begin_B + 1, length_B - 1).reshape(labels_BT.shape)
        labels_BT[is_last_BT] = NO_TARGET
        if not self._shards.all_learned:
            labels_BT[~self._shards.learned_spans(begin_B + 1, length_B - 1).reshape(labels_BT.shape)] = NO_TARGET
        docs_BT = np.cumsum(is_last_BT, axis=1) - is_last_BT
        return to_batch(input_BT, labels_BT, docs_BT)


class DocumentSequences:
    """Sequences of whole documents, and of pieces of those that are longer than T; a key is an array of piece numbers.

    Args:
        shards: the tokens.
        pieces: of the documents of these shards.
        width: T of every batch; None pads to the longest sequence of the batch, rounded up to 8.
        pad_id: the token at padded positions.
    """

    def __init__(self, shards: TokenShards, pieces: Pieces, *, width: int | None, pad_id: int) -> None:
        self._shards, self.pieces, self._width, self._pad_id = shards, pieces, width, pad_id

    def __getitems__(self, keys: list[np.ndarray]) -> Batch:
        """Returns the documents of each sequence; doc_ids counts them, no label crosses from one to the next."""
        if not keys:
            return filler(self._width or WIDTH_STEP, self._pad_id)
        ids_P = np.concatenate(keys)
        begin_P, length_P = self.pieces.begins[ids_P], self.pieces.lengths[ids_P].astype(np.int64)
        tokens = self._shards.spans(begin_P, length_P + 1)
        # The last token of a piece is only a label, its first one only an input.
        last_P = np.cumsum(length_P + 1) - 1
        input_M, target_M = np.delete(tokens, last_P), np.delete(tokens, last_P - length_P)
        if not self._shards.all_learned:
            target_M[~self._shards.learned_spans(begin_P + 1, length_P)] = NO_TARGET
        count_B = np.asarray([len(key) for key in keys])
        return packed_batch(count_B, length_P, input_M, target_M, width=self._width, pad_id=self._pad_id)
