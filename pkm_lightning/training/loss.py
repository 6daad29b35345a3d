"""Next-token loss, computed where a target is.

Letters: B sequences, T tokens, D model dimension, M positions with a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from pkm_lightning.errors import DataError

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer

#: Label of a position that has no target, as in `torch.nn.functional.cross_entropy`.
NO_TARGET = -100


def token_nll(model: Transformer, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, fp32, one for each position with a target, in row-major order, (M,).

    Only those positions are unembedded: where the loss is on the answer alone, that is most of the saving.
    """
    target_BT = labels_BT != NO_TARGET
    logits_MW = model.unembed(hidden_BTD[target_BT]).float()
    return functional.cross_entropy(logits_MW, labels_BT[target_BT], reduction="none")


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
