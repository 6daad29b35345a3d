"""One batch and unequal micro-batches of the same rows give the same step; so does a step that an epoch cuts short."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from training.fits import Batch, fit, rows, settings, split

import pkm_lightning.training.module
from pkm_lightning.build.model import build_model
from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.model import Transformer
from pkm_lightning.model.loss import token_nll
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.step import StepNormaliser


def assert_same_fit(actual: LanguageModule, expected: LanguageModule) -> None:
    """Weights agree as fp32 numbers do: the normaliser's factors are fp32."""
    for (name, weight), other in zip(actual.model.named_parameters(), expected.model.parameters(), strict=True):
        assert weight.dtype is torch.float64, name
        assert_close(weight.float(), other)
    losses = [module.trainer.callback_metrics["train/loss"] for module in (actual, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2], [4, 1, 1]])
def test_micro_batches_add_up_to_one_batch(sizes: list[int]) -> None:
    first, second = rows(6), rows(6)
    whole = fit(settings(), [first, second])
    parts = fit(settings(), [*split(first, sizes), *split(second, sizes)], accumulate_grad_batches=3)
    assert_same_fit(parts, whole)
    assert parts.global_step == whole.global_step == 2


@pytest.mark.parametrize("left_over", [1, 2])
def test_a_step_that_the_epoch_cuts_short_counts_its_own_targets(left_over: int) -> None:
    first, sizes = rows(6), [3, 1][:left_over]
    second = rows(sum(sizes))
    whole = fit(settings(), [first, second])
    parts = fit(settings(), [*split(first, [3, 1, 2]), *split(second, sizes)], accumulate_grad_batches=3)
    assert_same_fit(parts, whole)


def test_a_first_micro_batch_without_targets() -> None:
    batch = rows(3)
    batch["labels"][0] = NO_TARGET
    batch["labels"][1:, 0] = 7
    assert_same_fit(fit(settings(), split(batch, [1, 2]), accumulate_grad_batches=2), fit(settings(), [batch]))


def test_a_step_without_targets_changes_nothing() -> None:
    batch, empty = rows(2), rows(2)
    empty["labels"].fill_(NO_TARGET)
    module, without = fit(settings("ffn=dense"), [batch, empty]), fit(settings("ffn=dense"), [batch])
    for name, parameter in without.model.named_parameters():
        assert torch.equal(module.model.get_parameter(name), parameter), name


def initial_model(*overrides: str) -> Transformer:
    torch.set_default_dtype(torch.float64)
    try:
        model = build_model(settings(*overrides))
        model.init_weights(settings()["seed"])
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def direct_loss(model: Transformer, micro_batches: list[Batch]) -> Tensor:
    """Sum of token losses over the targets of the whole step; auxiliary losses weighted by targets."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in micro_batches:
        output = model(batch["input_ids"])
        nll_M = token_nll(model, output.hidden_BTD, batch["labels"])
        total = total + nll_M.sum() + sum(output.aux_losses.values()) * len(nll_M)
        targets += len(nll_M)
    return total / targets


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_step_follows_the_gradient_of_the_mean(accumulate: int) -> None:
    reporter = ("ffn=custom", "ffn._target_=toys.Reporter", "+ffn.aux_weight=0.5", "placement.layers=[1]")
    micro_batches = split(rows(6), [1, 3, 2]) if accumulate == 3 else [rows(6)]
    torch.manual_seed(1)  # the toy plugin draws its own weights
    model = initial_model(*reporter)
    start = copy.deepcopy(model.state_dict())
    loss = direct_loss(model, micro_batches)
    loss.backward()
    torch.manual_seed(1)
    module = fit(settings(*reporter, lr=0.1), micro_batches, accumulate_grad_batches=accumulate)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        step = (start[name] - module.model.get_parameter(name)) / 0.1
        assert_close(step.float().detach(), parameter.grad, kind="grad")


def test_factors_and_correction() -> None:
    normaliser = StepNormaliser()
    factors = [normaliser.scale(torch.tensor(n), world_size=2, accumulate=3) for n in (10, 4, 1)]
    assert [factor.item() for factor in factors] == pytest.approx([2 * 3 / 30] * 3)
    assert normaliser.total() == 15
    correction = normaliser.correction()
    assert correction is not None
    assert correction.item() == pytest.approx(30 / 15)
    normaliser.reset()
    assert normaliser.correction() is None
    normaliser.scale(torch.tensor(7), world_size=1, accumulate=1)
    assert normaliser.correction() is None


def test_an_auxiliary_loss_counts_as_its_share_of_the_tokens_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plays a second rank by its counts: 7 targets and 40 tokens beside this rank's 6 real ones."""
    given = settings("ffn=dense", lr=0.0)
    given["ffn"], given["placement"]["layers"] = {"_target_": "toys.Reporter", "aux_weight": 3.0}, "all"
    batch = rows(2, 8)
    batch["valid"] = torch.arange(8).expand(2, 8) < 3
    others, seen = torch.tensor([7, 40]), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs["loss"])

    def sum_over_ranks(value: Tensor) -> Tensor:
        return value + others if value.shape == others.shape else value

    monkeypatch.setattr(pkm_lightning.training.module, "sum_over_ranks", sum_over_ranks)
    module = fit(given, [batch], callbacks=[Watch()])
    with torch.no_grad():
        output = module(batch)
        nll_M = token_nll(module.model, output.hidden_BTD, batch["labels"])
    targets = nll_M.numel() + 7
    expected = (nll_M.sum() + output.aux_losses["toy"] * targets * 6 / 46) / targets
    assert float(seen[0]) == pytest.approx(float(expected), rel=1e-6)
