"""Expert choice against a loop over experts and tokens, in training and at evaluation; costs, gap metrics, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import moe_reference
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toys import config

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import ExpertChoiceMoE, FFNContext

SETTINGS: dict[str, Any] = {"dim": 7, "n_experts": 3, "capacity_factor": 1.0, "eval_top_k": 1, "hidden_dim": 4}
# Sizes and (sequences, tokens): whole and broken n c / E, one token, one expert, every expert takes every token.
CASES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({}, (2, 6)),
    ({"capacity_factor": 2.0, "eval_top_k": 2}, (2, 5)),
    ({"dim": 6, "n_experts": 4, "capacity_factor": 1.3, "hidden_dim": 1}, (3, 7)),
    ({"n_experts": 5, "capacity_factor": 5.0, "eval_top_k": 5}, (1, 4)),
    ({"n_experts": 1}, (1, 1)),
    ({"n_experts": 2, "capacity_factor": 2}, (1, 1)),
]


def build(**changes: Any) -> tuple[ExpertChoiceMoE, dict[str, Any]]:
    settings = {**SETTINGS, **changes}
    return ExpertChoiceMoE(**settings, n_layers=2, dense_hidden_dim=20).double(), settings


def context(x_BTD: Tensor, valid_BT: Tensor | None = None, *, observe: bool = True) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64), valid_BT, observe=observe)


def assert_trains_like_the_reference(
    layer: ExpertChoiceMoE, factor: float, x_BTD: Tensor, valid_BT: Tensor | None
) -> None:
    """Compares output, every gradient, the tokens of every expert, and both metrics."""
    x_BTD.requires_grad_()
    output = layer(x_BTD, context(x_BTD, valid_BT))
    real_T = torch.ones(x_BTD.shape[:2], dtype=torch.bool).flatten() if valid_BT is None else valid_BT.flatten()
    y_TD, chosen = moe_reference.expert_choice(layer, factor, x_BTD.flatten(0, 1), real_T)
    assert_close(output.y_BTD.flatten(0, 1), y_TD)
    traced = [column_T.nonzero().flatten().tolist() for column_T in output.trace["expert_chosen"].flatten(0, 1).T]
    assert traced == [sorted(tokens) for tokens in chosen]
    best_T = moe_reference.probabilities(layer, x_BTD.flatten(0, 1)).argmax(-1).tolist()
    real = real_T.nonzero().flatten().tolist()
    missed, unrouted = (
        sum(t not in chosen[best_T[t]] for t in real) / max(1, len(real)),
        sum(all(t not in tokens for tokens in chosen) for t in real) / max(1, len(real)),
    )
    assert output.metrics["expert_choice_mismatch"].item() == pytest.approx(missed)
    assert output.metrics["expert_choice_unrouted"].item() == pytest.approx(unrouted)
    if y_TD.requires_grad:
        inputs = [x_BTD, *layer.parameters()]
        g_TD = torch.randn_like(y_TD)
        actual = torch.autograd.grad(output.y_BTD, inputs, g_TD.view_as(x_BTD))
        expected = torch.autograd.grad(y_TD, inputs, g_TD)
        for grad, expected_grad in zip(actual, expected, strict=True):
            assert_close(grad, expected_grad, kind="grad")


@pytest.mark.parametrize(("changes", "shape"), CASES)
def test_training_equals_the_reference(changes: dict[str, Any], shape: tuple[int, int]) -> None:
    layer, settings = build(**changes)
    x_BTD = torch.randn(*shape, settings["dim"], dtype=torch.float64)
    assert_trains_like_the_reference(layer, settings["capacity_factor"], x_BTD, None)


@pytest.mark.parametrize("real", [24, 17, 2, 0])
@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_padding_is_never_selected_and_adds_no_capacity(real: int, factor: float) -> None:
    """Counts real tokens in k, although the shapes count positions: 2 real tokens and 3 experts give k = 0."""
    layer, _ = build(capacity_factor=factor)
    valid_BT = (torch.randperm(24) < real).view(3, 8)
    x_BTD = torch.randn(3, 8, 7, dtype=torch.float64)
    assert_trains_like_the_reference(layer, factor, x_BTD, valid_BT)
    other_BTD = x_BTD.detach().masked_fill(~valid_BT.unsqueeze(-1), 7.0)
    padded = context(x_BTD, valid_BT)
    assert torch.equal(layer(other_BTD, padded).y_BTD, layer(x_BTD, padded).y_BTD)


def test_an_unmasked_batch_and_a_mask_of_ones_are_equal() -> None:
    layer, _ = build(capacity_factor=1.1, n_experts=11)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.float64)
    masked = layer(x_BTD, context(x_BTD, torch.ones(2, 5, dtype=torch.bool)))
    assert torch.equal(masked.y_BTD, layer(x_BTD, context(x_BTD)).y_BTD)
    assert masked.trace["expert_chosen"].sum(dim=(0, 1)).tolist() == [1] * 11


@pytest.mark.parametrize(("changes", "shape"), CASES)
def test_evaluation_equals_the_reference(changes: dict[str, Any], shape: tuple[int, int]) -> None:
    layer, settings = build(**changes)
    x_BTD = torch.randn(*shape, settings["dim"], dtype=torch.float64, requires_grad=True)
    output = layer.eval()(x_BTD, context(x_BTD))
    y_TD = moe_reference.token_choice_of_expert_choice(layer, settings["eval_top_k"], x_BTD.flatten(0, 1))
    assert_close(output.y_BTD.flatten(0, 1), y_TD)
    assert (output.aux_losses, output.step_stats, output.metrics) == ({}, {}, {})
    inputs = [x_BTD, *layer.parameters()]
    g_TD = torch.randn_like(y_TD)
    actual = torch.autograd.grad(output.y_BTD, inputs, g_TD.view_as(x_BTD))
    for grad, expected in zip(actual, torch.autograd.grad(y_TD, inputs, g_TD), strict=True):
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("training", [True, False])
def test_ties_go_to_the_lower_index(training: bool) -> None:
    layer, _ = build(n_experts=4, capacity_factor=1.5, eval_top_k=2)
    layer.train(training)
    layer.router.weight.data = torch.randint(-1, 2, (4, 7)).double()
    layer.router.weight.data[2] = layer.router.weight.data[1]
    x_BTD = torch.randint(-1, 2, (2, 9, 7)).double()
    x_BTD[1, 4] = x_BTD[0, 3]
    if training:
        assert_trains_like_the_reference(layer, 1.5, x_BTD, None)
    else:
        y_TD = moe_reference.token_choice_of_expert_choice(layer, 2, x_BTD.flatten(0, 1))
        assert_close(layer(x_BTD, context(x_BTD)).y_BTD.flatten(0, 1), y_TD)


def test_evaluation_is_causal_and_training_is_not() -> None:
    layer, _ = build(hidden_dim=8)
    x_BTD = torch.randn(1, 12, 7, dtype=torch.float64)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 6:] = torch.randn(1, 6, 7) * 10
    looks_ahead = layer(x_BTD, context(x_BTD)).y_BTD[:, :6] - layer(changed_BTD, context(x_BTD)).y_BTD[:, :6]
    assert looks_ahead.any()
    layer.eval()
    before_BTD, after_BTD = (layer(x, context(x_BTD)).y_BTD[:, :6] for x in (x_BTD, changed_BTD))
    assert torch.equal(before_BTD, after_BTD)


def test_evaluation_loses_no_token_when_all_go_to_one_expert() -> None:
    layer, _ = build()
    layer.router.weight.data = torch.zeros(3, 7).double()
    layer.router.weight.data[2] = 1
    x_BTD = torch.rand(4, 50, 7, dtype=torch.float64)
    output = layer.eval()(x_BTD, context(x_BTD))
    assert (output.trace["expert_ids"] == 2).all()
    assert (output.y_BTD.abs().sum(-1) > 0).all()


def test_the_trace_is_filled_only_when_observed() -> None:
    layer, _ = build(eval_top_k=2)
    x_BTD = torch.randn(2, 6, 7, dtype=torch.float64)
    assert layer(x_BTD, context(x_BTD, observe=False)).trace == {}
    assert layer(x_BTD, context(x_BTD)).trace["expert_chosen"].shape == (2, 6, 3)
    layer.eval()
    assert layer(x_BTD, context(x_BTD, observe=False)).trace == {}
    trace = layer(x_BTD, context(x_BTD)).trace
    assert trace["expert_ids"].dtype is torch.int32
    weights_BTK, ids_BTK = (x_BTD @ layer.router.weight.T).softmax(-1).topk(2)
    assert torch.equal(trace["expert_ids"], ids_BTK.int())
    assert_close(trace["expert_weights"], weights_BTK.detach())
    assert not trace["expert_weights"].requires_grad


@pytest.mark.parametrize("factor", [1.0, 2.0, 1.25])
def test_cost_is_counted_exactly(factor: float) -> None:
    """Uses 20 tokens and 5 experts, so that n c / E and the mean FLOPs per token are integers."""
    layer, _ = build(n_experts=5, capacity_factor=factor, eval_top_k=3)
    x_BTD = torch.randn(4, 5, 7, dtype=torch.float64)
    counted = {}
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            layer.train(training)(x_BTD, context(x_BTD))
        counted[training] = counter.get_total_flops()
    cost, expert, router = layer.cost(), 3 * 7 * 4, 5 * 7
    assert cost.train_flops is not None
    assert cost.train_flops * 20 == counted[True]
    assert cost.flops * 20 == counted[False]
    assert cost.params == router + 5 * expert == sum(p.numel() for p in layer.parameters())
    assert cost.active_params == router + 3 * expert
    assert (cost.table_params, cost.lookup_bytes) == (0, 0)


def test_the_yaml_costs_a_dense_ffn_and_its_router() -> None:
    settings = config("ffn=moe_expert_choice")
    arguments = {name: value for name, value in settings["ffn"].items() if not name.startswith("_")}
    assert settings["placement"]["layers"] == "all"
    assert arguments == {
        "n_experts": 16, "capacity_factor": 1.0, "eval_top_k": 1, "hidden_dim": None, "dense_hidden_dim": 172,
    }  # fmt: skip
    cost = ExpertChoiceMoE(dim=64, n_layers=2, **arguments).cost()
    assert cost.flops == cost.train_flops == 2 * 64 * (3 * 172 + 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_experts": 0}, r"ffn.n_experts=0 is out of range; allowed: 1 or more\."),
        ({"capacity_factor": 0}, r"ffn.capacity_factor=0 gives no expert any token; use a number above 0"),
        ({"capacity_factor": -1.0}, r"ffn.capacity_factor=-1.0 is out of range; allowed: 0 to 3\."),
        ({"capacity_factor": 3.5}, r"ffn.capacity_factor=3.5 is out of range; allowed: 0 to 3\."),
        ({"eval_top_k": 4}, r"ffn.eval_top_k=4 is out of range; allowed: 1 to 3\."),
        ({"eval_top_k": 0}, r"ffn.eval_top_k=0 is out of range"),
        ({"hidden_dim": 0}, r"ffn.hidden_dim=0 is out of range; allowed: 1 or more\."),
        ({"hidden_dim": 2.5}, r"ffn.hidden_dim=2.5 is not a whole number\."),
    ],
)
def test_refuses_bad_settings_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        build(**changes)
    assert "\n" not in str(refusal.value)


def test_refuses_a_micro_batch_without_a_token_for_each_expert_in_training() -> None:
    layer, _ = build(n_experts=16, capacity_factor=1.5)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.float64)
    message = (
        r"^ffn.capacity_factor=1.5 gives each of ffn.n_experts=16 experts only 0.938 of the micro-batch's 10 tokens; "
        r"raise ffn.capacity_factor or the micro-batch\.$"
    )
    with pytest.raises(ConfigError, match=message):
        layer(x_BTD, context(x_BTD))
    assert layer.eval()(x_BTD, context(x_BTD)).y_BTD.shape == x_BTD.shape
