"""The token loss against cross-entropy over all positions.

Letters: M positions with a target, W vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional
from toys import DIM, VOCAB, dense, token_ids, transformer

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.model.loss import token_nll


def test_equals_cross_entropy_where_targets_are() -> None:
    model, hidden_BTD, labels_BT = transformer([dense()]), torch.randn(3, 5, DIM), token_ids(3, 5)
    labels_BT[0, 1:4] = NO_TARGET
    labels_BT[2] = NO_TARGET
    logits_BTW = model.unembed(hidden_BTD)
    everywhere_BT = functional.cross_entropy(logits_BTW.transpose(1, 2), labels_BT, reduction="none")
    assert_close(token_nll(model, hidden_BTD, labels_BT), everywhere_BT[labels_BT != NO_TARGET])


def test_the_gradient_is_that_of_cross_entropy_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.model.loss._CACHED", 3 * VOCAB)  # chunks of three rows, and one of two
    model, labels_BT = transformer([dense()]), token_ids(1, 5)
    hidden_BTD = torch.randn(1, 5, DIM).requires_grad_()
    expected_M = functional.cross_entropy(model.unembed(hidden_BTD)[0], labels_BT[0], reduction="none")
    nll_M, upstream_M = token_nll(model, hidden_BTD, labels_BT), torch.randn(5)
    assert torch.equal(nll_M, expected_M)
    (grad_BTD,), (expected_BTD,) = (torch.autograd.grad(loss, hidden_BTD, upstream_M) for loss in (nll_M, expected_M))
    assert_close(grad_BTD, expected_BTD, kind="grad")


def test_is_fp32_in_a_bf16_model_and_empty_without_targets() -> None:
    model = transformer([dense()]).bfloat16()
    hidden_BTD, labels_BT = torch.randn(1, 4, DIM).bfloat16(), token_ids(1, 4)
    assert token_nll(model, hidden_BTD, labels_BT).dtype is torch.float32
    assert token_nll(model, hidden_BTD, torch.full_like(labels_BT, NO_TARGET)).shape == (0,)
