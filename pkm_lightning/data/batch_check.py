"""Checks of the batches that a data module makes: one sentence instead of a wrong loss or an error deep in the model.

Kinds and shapes are compared in every batch. Values are compared where they lie on the host, in microseconds; on a GPU
that would wait for the device, so that only some batches are looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.errors import DataError

__all__ = ["check_batch"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
#: The types that a key of a batch may have; the first of them is the one of the contract.
_DTYPES = {
    "input_ids": (torch.int64,),
    "labels": (torch.int64,),
    "doc_ids": (torch.int64, *_INTEGERS),
    "valid": (torch.bool,),
}


def check_batch(
    batch: object, vocab_size: int, *, where: str = "a batch", sampled: bool = True, first: bool = True
) -> None:
    """Refuses a batch that breaks the contract.

    Args:
        batch: whatever the loader gave.
        vocab_size: of the model.
        where: names the batch in messages.
        sampled: compare the values although they lie on a GPU.
        first: also refuse labels that were not shifted, which a later batch may resemble by chance.

    Raises:
        DataError: not a dict, missing keys, tensors of other types or shapes, ids outside the vocabulary, or labels
            that were not shifted.
    """
    _check_tensors(batch, where)
    assert isinstance(batch, dict)
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    if ids_BT.device.type == "cpu" or sampled:
        _check_values(ids_BT, labels_BT, vocab_size, where)
        if first:
            _check_shift(ids_BT, labels_BT, where)


def _check_tensors(batch: object, where: str) -> None:
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= batch.keys():
        content = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"{where} must be a dict with input_ids and labels (and doc_ids, valid if any); got {content}.")
    for name, allowed in _DTYPES.items():
        if name not in batch:
            continue
        value: Any = batch[name]
        if not isinstance(value, Tensor) or value.dtype not in allowed:
            kind = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            expected = str(allowed[0]).removeprefix("torch.")
            raise DataError(f"{where}: batch['{name}'] is {kind}; it must be a tensor of {expected}.")
        if value.shape != batch["input_ids"].shape:
            shapes = f"has shape {tuple(value.shape)}, input_ids {tuple(batch['input_ids'].shape)}"
            raise DataError(f"{where}: batch['{name}'] {shapes}.")
    if batch["input_ids"].ndim != 2 or not batch["input_ids"].numel():
        shape = tuple(batch["input_ids"].shape)
        raise DataError(f"{where}: batch['input_ids'] has shape {shape}; it must be (sequences, tokens), not empty.")


def _check_values(ids_BT: Tensor, labels_BT: Tensor, vocab_size: int, where: str) -> None:
    low, high = (int(bound) for bound in ids_BT.aminmax())
    lowest_label, highest_label = (int(bound) for bound in labels_BT.aminmax())
    high = max(high, highest_label)
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{where}: token ids run from {low} to {high}, but model.vocab_size={vocab_size} allows 0 to "
            f"{vocab_size - 1}: correct the vocab_size of the data module, which model.vocab_size=auto takes, or set "
            f"model.vocab_size={max(high + 1, 1)} or more."
        )
    if lowest_label < 0:
        wrong_M = labels_BT[(labels_BT < 0) & (labels_BT != NO_TARGET)]
        if wrong_M.numel():
            raise DataError(
                f"{where}: labels hold {int(wrong_M.min())}; allowed: token ids, and {NO_TARGET} for no target."
            )


def _check_shift(ids_BT: Tensor, labels_BT: Tensor, where: str) -> None:
    is_target_BT = labels_BT != NO_TARGET
    targets_M = labels_BT[is_target_BT]
    # Few equal tokens may be chance, and a text that repeats one token equals itself shifted: neither is refused.
    copied = targets_M.numel() > 8 and bool((targets_M == ids_BT[is_target_BT]).all())
    inner_BT = is_target_BT[:, :-1]
    if copied and not bool((labels_BT[:, :-1][inner_BT] == ids_BT[:, 1:][inner_BT]).all()):
        raise DataError(
            f"{where}: labels equal input_ids: labels[t] must be the token that follows input_ids[t]; shift them by "
            "one."
        )


def check_prompt_batch(batch: object, where: str) -> None:
    """Refuses a batch for `predict` that breaks the contract.

    Raises:
        DataError: not a dict of `prompt`, a list of texts, and `index`, as many whole numbers.
    """
    if isinstance(batch, dict) and {"prompt", "index"} <= batch.keys():
        prompts, index = batch["prompt"], batch["index"]
        texts = isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts)
        numbers = index.tolist() if isinstance(index, Tensor) else index
        whole = isinstance(numbers, list | tuple) and all(isinstance(number, int) for number in numbers)
        if texts and whole and prompts and len(prompts) == len(numbers):
            return
        content = f"prompt={prompts!r}, index={index!r}"[:200]
    else:
        content = str(sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__)
    raise DataError(
        f"{where} must be a dict with prompt, a list of texts, and index, as many whole numbers; got {content}."
    )
