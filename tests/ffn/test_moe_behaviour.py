"""Both mixtures of experts as modules: precision, reports, casts, bias updates, losses of several ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ffn import moe_reference
from ffn.test_moe import SETTINGS, build, context
from tolerances import assert_close
from torch import Tensor, nn
from training.fits import fit, rows, settings, split

import pkm_lightning.ffn.moe
from pkm_lightning.ffn import ExpertChoiceMoE, MoE

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "renormalise": True, "shared_experts": 1, "balancing": "bias", "routed_scale": 2.5},
    {"select": "after", "balancing": "none"},
]


def token_choice(**changes: Any) -> MoE:
    return build(**changes)[0].float()


def expert_choice() -> ExpertChoiceMoE:
    layer = {"dim": 7, "n_experts": 5, "capacity_factor": 1.5, "eval_top_k": 2, "hidden_dim": 3}
    return ExpertChoiceMoE(**layer, n_layers=2, dense_hidden_dim=1)


def reference(layer: nn.Module, options: dict[str, Any], x_BTD: Tensor) -> Tensor:
    exact = copy.deepcopy(layer).double()
    return moe_reference.token_choice(exact, {**SETTINGS, **options}, x_BTD.double())[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_models_and_autocast_are_close_to_float64(options: dict[str, Any]) -> None:
    """Compares with a reference that selects the same experts, since the router's scores are fp32 in both."""
    layer, x_BTD = token_choice(**options), torch.randn(2, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["expert_weights"].dtype is torch.float32
    assert {loss.dtype for loss in output.aux_losses.values()} == {torch.float32}
    assert_close(output.y_BTD, reference(layer, options, x_BTD))
    layer, x_BTD = layer.bfloat16(), x_BTD.bfloat16()
    output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["expert_weights"].dtype is torch.float32
    assert_close(output.y_BTD, reference(layer, options, x_BTD))


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_in_bf16_is_close_to_float64(training: bool) -> None:
    layer, x_BTD = expert_choice().train(training), torch.randn(2, 9, 7)
    every_T = torch.ones(18, dtype=torch.bool)
    for autocast in (True, False):
        if not autocast:
            layer, x_BTD = layer.bfloat16(), x_BTD.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
        exact, x_TD = copy.deepcopy(layer).double(), x_BTD.flatten(0, 1).double()
        if training:
            expected_TD = moe_reference.expert_choice(exact, 1.5, x_TD, every_T)[0]
        else:
            expected_TD = moe_reference.token_choice_of_expert_choice(exact, 2, x_TD)
        assert y_BTD.dtype is torch.bfloat16
        assert_close(y_BTD.flatten(0, 1), expected_TD)


def test_evaluation_reports_nothing_and_the_trace_comes_when_asked() -> None:
    layer, x_BTD = token_choice(**OPTIONS[1]).eval(), torch.randn(2, 5, 7)
    output = layer(x_BTD, context(x_BTD))
    assert (output.aux_losses, output.step_stats, output.metrics, output.trace) == ({}, {}, {}, {})
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    assert trace["expert_ids"].dtype is torch.int32
    assert trace["expert_ids"].shape == trace["expert_weights"].shape == (2, 5, 2)
    assert not trace["expert_weights"].requires_grad
    assert_close(trace["expert_weights"].sum(-1), torch.full((2, 5), 2.5))


def test_a_cast_to_bf16_leaves_the_bias_exact() -> None:
    layer = token_choice(balancing="bias")
    layer.bias_steps.copy_(torch.tensor([1001, -999, 0, 257, 100_001]))  # bf16 has 8 bits of precision
    cast = copy.deepcopy(layer).bfloat16().float()
    assert cast.bias_steps.dtype is torch.int64
    assert torch.equal(cast.bias_steps, layer.bias_steps)
    assert "bias_steps" not in token_choice(balancing="loss").state_dict()


def test_the_bias_follows_the_loads_of_a_step() -> None:
    layer = token_choice(balancing="bias")
    layer.bias_steps.zero_()
    layer.after_step({"expert_counts": torch.tensor([0, 8, 3, 4, 5])})
    layer.after_step({})
    layer.after_step({"expert_counts": torch.tensor([0, 8, 4, 4, 4])})
    assert layer.bias_steps.tolist() == [2, -2, 1, 0, -1]
    other = token_choice(balancing="loss")
    other.after_step({"expert_counts": torch.tensor([0, 8, 3, 4, 5])})


def test_one_optimizer_step_moves_the_bias_once_by_the_loads_of_all_its_micro_batches() -> None:
    """Recomputes each forward in backward, which must not count its tokens a second time."""
    batch = rows(6)
    batch["valid"] = torch.rand(6, 8) < 0.7
    overrides = ("ffn=moe", "ffn.n_experts=5", "ffn.top_k=2", "ffn.balancing=bias", "model.n_layers=1")
    config = settings(*overrides, "model.activation_checkpointing=true", lr=0.0)
    model = fit(config, split(batch, [1, 3, 2]), accumulate_grad_batches=3).model
    steps_E = model.blocks[0].ffn.bias_steps.clone()
    model.blocks[0].ffn.bias_steps.zero_()  # as it was during the step
    trace = model(batch["input_ids"], observe=True).traces[0]
    loads_E = torch.bincount(trace["expert_ids"][batch["valid"]].flatten(), minlength=5)
    assert torch.equal(steps_E, torch.sign(loads_E.double().mean() - loads_E).long())
    assert steps_E.any()


def test_ranks_with_shares_of_the_whole_batch_average_to_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = build(z_loss=0.0, sequence_balance_loss=0.0)
    x_BTD = torch.randn(4, 5, 7, dtype=torch.float64)
    whole = layer(x_BTD, context(x_BTD)).aux_losses["balance"]
    chosen = layer(x_BTD, context(x_BTD, observe=True)).trace["expert_ids"]
    total_E = torch.bincount(chosen.flatten(), minlength=5)
    monkeypatch.setattr(pkm_lightning.ffn.moe, "sum_over_ranks", lambda counts_E: total_E)
    ranks = [layer(part_BTD, context(part_BTD)).aux_losses["balance"] for part_BTD in x_BTD.split(2)]
    assert_close(torch.stack(ranks).mean(), whole)
    inputs = list(layer.router.parameters())
    for of_ranks, expected in zip(
        torch.autograd.grad(torch.stack(ranks).mean(), inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        assert_close(of_ranks, expected, kind="grad")


def test_scores_near_zero_are_renormalised_too() -> None:
    """Sigmoids of logits around -25: their sums are 1e-10, and their ratios those of the exponentials."""
    layer, x_BTD = token_choice(**OPTIONS[1], top_k=3), torch.ones(1, 1, 7)
    with torch.no_grad():
        layer.router.weight.copy_(-(25 + torch.arange(5.0) / 4).unsqueeze(-1).expand(5, 7) / 7)
    output = layer(x_BTD, context(x_BTD, observe=True))
    expected_K = torch.softmax(-torch.arange(3.0) / 4, dim=0) * 2.5
    assert_close(output.trace["expert_weights"].flatten(), expected_K)
