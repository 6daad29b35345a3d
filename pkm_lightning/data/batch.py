"""Building blocks of batches: keys of sequences become tensors without a Python loop over tokens."""

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
