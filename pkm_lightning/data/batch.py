"""A batch is a dict of tensors; this file says which, and turns token statements into them without a Python loop.

Letters: B rows, T columns, S statements in a batch, N tokens in a batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]

IGNORE = -100
"""The label of a position that carries no loss."""


class RowSource(Protocol):
    """Turns row keys, which only the matching order understands, into one batch.

    DataLoader finds `__getitems__` by itself. An empty list of keys asks for a filler: a batch without any target.
    """

    def __getitems__(self, keys: list[Any]) -> Batch:
        """The batch that holds the rows `keys`."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type that token ids are stored in."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def as_is(batch: Any) -> Any:
    """The collate function of loaders whose source already returns whole batches."""
    return batch


def filler(width: int, pad_id: int) -> Batch:
    """One row of padding, for ranks that have run out of samples: all ranks must make the same number of calls."""
    ids_BT = torch.full((1, width), pad_id, dtype=torch.int64)
    return {
        "input_ids": ids_BT,
        "labels": torch.full_like(ids_BT, IGNORE),
        "doc_ids": torch.full_like(ids_BT, -1),
        "valid": torch.zeros_like(ids_BT, dtype=torch.bool),
    }


def to_batch(input_BT: np.ndarray, labels_BT: np.ndarray, docs_BT: np.ndarray) -> Batch:
    """Tensors from three int64 arrays (B, T); a position is valid where its document id is not -1."""
    doc_ids_BT = torch.from_numpy(docs_BT)
    return {
        "input_ids": torch.from_numpy(input_BT),
        "labels": torch.from_numpy(labels_BT),
        "doc_ids": doc_ids_BT,
        "valid": doc_ids_BT >= 0,
    }
