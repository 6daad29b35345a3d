"""Building blocks of batches: keys of sequences become tensors without a Python loop over tokens.

Letters: P statements in a batch, M their input tokens laid end to end.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from pkm_lightning.data.base import NO_TARGET, Batch


class SequenceSource(Protocol):
    """Turns keys of sequences, which only the matching order understands, into one batch.

    An empty list of keys asks for a filler: a batch without any target.
    """

    # DataLoader calls this name, with all keys of a batch at once, where a data set has it.
    def __getitems__(self, keys: list[Any]) -> Batch:
        """Returns the batch that holds the sequences `keys`."""


#: Sequences that are not packed are padded to a multiple of this, so that batches have few different shapes.
WIDTH_STEP = 8


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Returns the type that token ids are stored in."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def as_is(batch: Any) -> Any:
    """Returns the batch unchanged: the collate function of loaders whose source returns whole batches."""
    return batch


def filler(width: int, pad_id: int) -> Batch:
    """Returns one sequence of padding, for ranks that have no samples left: all ranks make equally many calls."""
    # A sequence, and not an empty tensor: plugins and attention kernels need not handle batches without tokens.
    ids_BT = torch.full((1, width), pad_id, dtype=torch.int64)
    return {
        "input_ids": ids_BT,
        "labels": torch.full_like(ids_BT, NO_TARGET),
        "doc_ids": torch.full_like(ids_BT, -1),
        "valid": torch.zeros_like(ids_BT, dtype=torch.bool),
    }


def to_batch(input_BT: np.ndarray, labels_BT: np.ndarray, docs_BT: np.ndarray) -> Batch:
    """Returns the batch of three int64 arrays (B, T); a position is valid where its document id is not -1."""
    doc_ids_BT = torch.from_numpy(docs_BT)
    return {
        "input_ids": torch.from_numpy(input_BT),
        "labels": torch.from_numpy(labels_BT),
        "doc_ids": doc_ids_BT,
        "valid": doc_ids_BT >= 0,
    }


def packed_batch(
    count_B: np.ndarray,
    length_P: np.ndarray,
    input_M: np.ndarray,
    target_M: np.ndarray,
    *,
    width: int | None,
    pad_id: int,
) -> Batch:
    """Returns the batch of statements that stand side by side in their sequences; doc_ids counts them from 0.

    Args:
        count_B: statements per sequence, 1 or more.
        length_P: input tokens of each statement, those of the first sequence first.
        input_M: the input tokens.
        target_M: the token that follows each of them, or `NO_TARGET`.
        width: T; None for that of the longest sequence, rounded up to a multiple of `WIDTH_STEP`.
        pad_id: the token at padded positions.
    """
    sequence_P = np.repeat(np.arange(len(count_B)), count_B)
    first_B = np.cumsum(count_B) - count_B
    # Where a statement begins: in the batch laid end to end, then in its own sequence.
    begin_P = np.cumsum(length_P) - length_P
    column_P = begin_P - begin_P[first_B][sequence_P]
    if width is None:
        width = -(-int((column_P + length_P).max()) // WIDTH_STEP) * WIDTH_STEP
    place = np.repeat(sequence_P, length_P), np.arange(len(input_M)) - np.repeat(begin_P - column_P, length_P)
    shape = (len(count_B), width)
    input_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, NO_TARGET, dtype=np.int64)
    docs_BT = np.full(shape, -1, dtype=np.int64)
    input_BT[place] = input_M
    labels_BT[place] = target_M
    docs_BT[place] = np.repeat(np.arange(len(length_P)) - first_B[sequence_P], length_P)
    return to_batch(input_BT, labels_BT, docs_BT)
