"""The token loss against cross-entropy over all positions, and the check of a user's first batch.

Letters: M positions with a target, W vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional
from toys import DIM, VOCAB, dense, token_ids, transformer

from pkm_lightning.data.base import NO_TARGET, check_batch
from pkm_lightning.errors import DataError
from pkm_lightning.model.loss import token_nll


def test_equals_cross_entropy_where_targets_are() -> None:
    model, hidden_BTD, labels_BT = transformer([dense()]), torch.randn(3, 5, DIM), token_ids(3, 5)
    labels_BT[0, 1:4] = NO_TARGET
    labels_BT[2] = NO_TARGET
    logits_BTW = model.unembed(hidden_BTD)
    everywhere_BT = functional.cross_entropy(logits_BTW.transpose(1, 2), labels_BT, reduction="none")
    assert_close(token_nll(model, hidden_BTD, labels_BT), everywhere_BT[labels_BT != NO_TARGET])


def test_is_fp32_in_a_bf16_model_and_empty_without_targets() -> None:
    model = transformer([dense()]).bfloat16()
    hidden_BTD, labels_BT = torch.randn(1, 4, DIM).bfloat16(), token_ids(1, 4)
    assert token_nll(model, hidden_BTD, labels_BT).dtype is torch.float32
    assert token_nll(model, hidden_BTD, torch.full_like(labels_BT, NO_TARGET)).shape == (0,)


def batch(**changes: Any) -> dict[str, Any]:
    ids_BT = torch.arange(20).view(2, 10)
    return {"input_ids": ids_BT, "labels": ids_BT + 1, **changes}


def test_a_good_batch_passes() -> None:
    check_batch(batch(), VOCAB)
    check_batch(batch(labels=torch.full((2, 10), NO_TARGET), doc_ids=torch.zeros(2, 10)), VOCAB)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"must be a dict with input_ids and labels .* got list\."),
        ({"input_ids": torch.zeros(1, 2)}, r"got \['input_ids'\]\."),
        (batch(labels=torch.zeros(2, 9, dtype=torch.int64)), r"\['labels'\] has shape \(2, 9\), input_ids \(2, 10\)"),
        (batch(valid=torch.ones(2, 1, dtype=torch.bool)), r"batch\['valid'\] has shape \(2, 1\)"),
        (batch(input_ids=torch.full((2, 10), 50)), r"run from 50 to 50, but model.vocab_size=50 allows 0 to 49"),
        (batch(labels=torch.full((2, 10), 77)), r"run from 0 to 77"),
        (batch(input_ids=torch.arange(-1, 19).view(2, 10)), r"run from -1 to "),
        (batch(labels=torch.arange(20).view(2, 10)), r"labels equal input_ids: .* shift them by one"),
    ],
)
def test_a_bad_batch_is_refused(content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(content, VOCAB)
