"""The token loss against cross-entropy over all positions.

Letters: M positions with a target, W vocabulary.
"""

from __future__ import annotations

import torch
from tolerances import assert_close
from torch.nn import functional
from toys import DIM, dense, token_ids, transformer

from pkm_lightning.data.base import NO_TARGET
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
