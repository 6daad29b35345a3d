"""A batch is a dict of tensors; this file says which, and turns token statements into them without a Python loop.

Letters: B rows, T columns, S statements in a batch, N tokens in a batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pkm_lightning.errors import DataError

Batch = dict[str, Tensor]

#: The label of a position that carries no loss, as in `torch.nn.functional.cross_entropy`.
NO_TARGET = -100


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
        "labels": torch.full_like(ids_BT, NO_TARGET),
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


def check_batch(batch: object, vocab_size: int) -> None:
    """Refuse a batch that breaks the contract; read once, on the first batch, since it looks at the values.

    Raises:
        DataError: not a dict, missing keys, wrong shapes, ids outside the vocabulary, or labels that were not shifted.
    """
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= batch.keys():
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"a batch must be a dict with input_ids and labels (and doc_ids, valid if any); got {found}.")
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    for name in ("labels", "doc_ids", "valid"):
        if name in batch and batch[name].shape != ids_BT.shape:
            raise DataError(f"batch['{name}'] has shape {tuple(batch[name].shape)}, input_ids {tuple(ids_BT.shape)}.")
    if ids_BT.ndim != 2 or not ids_BT.numel():
        raise DataError(
            f"batch['input_ids'] has shape {tuple(ids_BT.shape)}; it must be (sequences, tokens), not empty."
        )
    targets_M = labels_BT[labels_BT != NO_TARGET]
    low, high = int(ids_BT.min()), max(int(ids_BT.max()), int(targets_M.max()) if targets_M.numel() else 0)
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"token ids run from {low} to {high}, but model.vocab_size={vocab_size} allows 0 to {vocab_size - 1}: "
            "set model.vocab_size, or model.vocab_size=auto to take the data module's."
        )
    if targets_M.numel() and int(targets_M.min()) < 0:
        raise DataError(f"labels hold {int(targets_M.min())}; allowed: token ids, and {NO_TARGET} for no target.")
    copied = targets_M.numel() > 8 and bool((targets_M == ids_BT[labels_BT != NO_TARGET]).all())
    inner_BT = labels_BT[:, :-1] != NO_TARGET
    if copied and not bool((labels_BT[:, :-1][inner_BT] == ids_BT[:, 1:][inner_BT]).all()):
        raise DataError(
            "labels equal input_ids: labels[t] must be the token that follows input_ids[t]; shift them by one."
        )
