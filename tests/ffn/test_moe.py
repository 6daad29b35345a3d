"""The token-choice mixture against a loop over tokens and experts: outputs, every gradient and loss, costs, errors."""

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
from pkm_lightning.ffn import FFNContext, MoE

SETTINGS: dict[str, Any] = {
    "dim": 7, "n_experts": 5, "top_k": 2, "hidden_dim": 3, "shared_experts": 0, "score": "softmax", "select": "before",
    "renormalise": False, "routed_scale": 1.0, "balancing": "loss", "balance_loss": 0.3, "z_loss": 0.2,
    "sequence_balance_loss": 0.1, "bias_rate": 0.05,
}  # fmt: skip
# Even and odd sizes, one expert, all experts, one hidden unit.
SIZES: list[dict[str, Any]] = [
    {"dim": 6, "n_experts": 4, "top_k": 1, "hidden_dim": 5},
    {"dim": 7, "n_experts": 5, "top_k": 3, "hidden_dim": 2},
    {"dim": 3, "n_experts": 3, "top_k": 3, "hidden_dim": 1, "shared_experts": 3},
    {"dim": 5, "n_experts": 1, "top_k": 1, "hidden_dim": 4},
    {"dim": 8, "n_experts": 16, "top_k": 8, "hidden_dim": 2, "shared_experts": 1},
]
# Every pair of values of two options occurs.
OPTIONS = [
    dict(zip(("score", "select", "balancing", "renormalise", "shared_experts"), row, strict=True))
    for row in [
        ("softmax", "before", "loss", True, 0),
        ("softmax", "before", "bias", False, 2),
        ("softmax", "before", "none", True, 0),
        ("softmax", "after", "loss", False, 0),
        ("softmax", "after", "bias", True, 2),
        ("softmax", "after", "none", False, 0),
        ("sigmoid", "before", "loss", True, 2),
        ("sigmoid", "before", "bias", False, 0),
        ("sigmoid", "before", "none", True, 2),
    ]
]


def build(**changes: Any) -> tuple[MoE, dict[str, Any]]:
    """Builds a float64 layer in training mode, whose bias, if any, is large enough to change the selection."""
    settings = {**SETTINGS, **changes}
    layer = MoE(**settings, n_layers=2, dense_hidden_dim=20).double()
    if settings["balancing"] == "bias":
        layer.bias_steps.copy_(torch.arange(settings["n_experts"]).flip(0) * 3 - 4)
    return layer, settings


def context(x_BTD: Tensor, valid_BT: Tensor | None = None, *, observe: bool = False) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64), valid_BT, observe=observe)


def assert_equals_reference(layer: MoE, settings: dict[str, Any], x_BTD: Tensor, valid_BT: Tensor | None) -> None:
    """Compares output, losses and loads, and the gradients of the output and of each loss in every input."""
    x_BTD.requires_grad_()
    output = layer(x_BTD, context(x_BTD, valid_BT))
    y_BTD, losses, loads_E = moe_reference.token_choice(layer, settings, x_BTD, valid_BT)
    assert_close(output.y_BTD, y_BTD)
    assert output.aux_losses.keys() == losses.keys()
    if settings["balancing"] == "bias":
        assert torch.equal(output.step_stats["expert_counts"], loads_E)
    else:
        assert output.step_stats == {}
    assert_close(output.metrics["expert_load_max"], loads_E.max() / loads_E.float().mean())
    inputs = [x_BTD, *layer.parameters()]
    upstream_BTD = torch.randn_like(y_BTD)
    actual_sums = [(output.y_BTD * upstream_BTD).sum(), *(output.aux_losses[name] for name in losses)]
    expected_sums = [(y_BTD * upstream_BTD).sum(), *losses.values()]
    for actual, expected in zip(actual_sums, expected_sums, strict=True):
        assert_close(actual, expected)
        grads = torch.autograd.grad(actual, inputs, retain_graph=True, allow_unused=True)
        expected_grads = torch.autograd.grad(expected, inputs, retain_graph=True, allow_unused=True)
        for grad, expected_grad, leaf in zip(grads, expected_grads, inputs, strict=True):
            zero = torch.zeros_like(leaf)
            assert_close(zero if grad is None else grad, zero if expected_grad is None else expected_grad, kind="grad")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_equals_the_reference(options: dict[str, Any]) -> None:
    layer, settings = build(**options)
    valid_BT = torch.tensor([[True, True, True, False, False], [False, True, True, True, True], [False] * 5])
    for valid in (None, valid_BT):
        assert_equals_reference(layer, settings, torch.randn(3, 5, 7, dtype=torch.float64), valid)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 5)])
def test_every_size_equals_the_reference(sizes: dict[str, Any], tokens: tuple[int, int]) -> None:
    layer, settings = build(**sizes, routed_scale=2.5)
    assert_equals_reference(layer, settings, torch.randn(*tokens, sizes["dim"], dtype=torch.float64), None)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_ties_go_to_the_lower_index(score: str, balancing: str) -> None:
    """Draws small integers, so that logits are exact and many are equal in both computations."""
    layer, settings = build(score=score, balancing=balancing, bias_rate=0.0, top_k=3)
    layer.router.weight.data = torch.randint(-1, 2, (5, 7)).double()
    layer.router.weight.data[3] = layer.router.weight.data[1]
    assert_equals_reference(layer, settings, torch.randint(-1, 2, (3, 6, 7)).double(), None)


def test_a_bias_changes_the_selection_and_not_the_weights() -> None:
    layer, _ = build(balancing="bias", score="sigmoid")
    layer.bias_steps.copy_(torch.tensor([0, 0, 0, 1000, 1000]))
    x_BTD = torch.randn(2, 4, 7, dtype=torch.float64)
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    assert torch.equal(trace["expert_ids"].sort(-1).values, torch.tensor([3, 4]).int().expand(2, 4, 2))
    scores_BTE = torch.sigmoid(x_BTD @ layer.router.weight.T)
    assert_close(trace["expert_weights"], scores_BTE.gather(-1, trace["expert_ids"].long()).detach())


def test_no_token_is_lost_when_all_go_to_one_expert() -> None:
    layer, settings = build(top_k=1)
    layer.router.weight.data = torch.zeros(5, 7).double()
    layer.router.weight.data[3] = 1
    x_BTD = torch.rand(4, 50, 7, dtype=torch.float64)
    output = layer(x_BTD, context(x_BTD, observe=True))
    assert (output.trace["expert_ids"] == 3).all()
    assert output.metrics["expert_load_max"] == 5
    assert (output.y_BTD.abs().sum(-1) > 0).all()
    assert_close(output.y_BTD, moe_reference.token_choice(layer, settings, x_BTD)[0])


@pytest.mark.parametrize("sizes", [*SIZES, {"dim": 33, "n_experts": 64, "top_k": 8, "hidden_dim": 11}])
def test_cost_is_counted_exactly(sizes: dict[str, Any]) -> None:
    layer, settings = build(**sizes)
    dim, x_BTD = settings["dim"], torch.randn(2, 5, settings["dim"], dtype=torch.float64)
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            layer.train(training)(x_BTD, context(x_BTD))
        assert layer.cost().flops * 10 == counter.get_total_flops()
    cost, expert = layer.cost(), 3 * dim * settings["hidden_dim"]
    experts, router = settings["n_experts"], settings["n_experts"] * dim
    shared = settings["shared_experts"] * expert
    assert cost.params == router + experts * expert + shared == sum(p.numel() for p in layer.parameters())
    assert cost.active_params == router + settings["top_k"] * expert + shared
    assert (cost.table_params, cost.lookup_bytes, cost.train_flops) == (0, 0, None)


def test_initial_output_has_the_variance_of_dense_times_the_squared_weights() -> None:
    """Sums independent experts, each of the variance of `Dense`: E[silu(z)**2] / (2 n_layers), z ~ N(0, 1)."""
    layer = MoE(**{**SETTINGS, "dim": 64, "hidden_dim": 100, "shared_experts": 1}, n_layers=3, dense_hidden_dim=1)
    x_BTD = torch.randn(8, 64, 64)
    output = layer(x_BTD, context(x_BTD, observe=True))
    of_dense = torch.nn.functional.silu(torch.randn(1_000_000)).square().mean() / (2 * 3)
    squares = output.trace["expert_weights"].square().sum(-1).mean() + 1  # and the shared expert, of weight one
    assert output.y_BTD.var().item() == pytest.approx((of_dense * squares).item(), rel=0.1)


@pytest.mark.parametrize(
    ("top_k", "shared", "hidden_dim"), [(8, 0, 22), (2, 0, 86), (8, 1, 19), (1, 0, 172), (60, 200, 1)]
)
def test_the_active_size_is_that_of_the_dense_ffn(top_k: int, shared: int, hidden_dim: int) -> None:
    changes = {"n_experts": 64, "top_k": top_k, "shared_experts": shared, "hidden_dim": None}
    layer = MoE(**{**SETTINGS, **changes}, n_layers=2, dense_hidden_dim=172)
    assert layer.experts.gate.shape == (64, 7, hidden_dim)
    assert (layer.shared is None) == (shared == 0)
    if layer.shared is not None:
        assert layer.shared.gate.out_features == shared * hidden_dim


def test_the_yaml_routes_like_olmoe_in_every_layer() -> None:
    settings = config("ffn=moe")
    arguments = {name: value for name, value in settings["ffn"].items() if not name.startswith("_")}
    assert settings["placement"]["layers"] == "all"
    assert arguments == {
        "n_experts": 64, "top_k": 8, "shared_experts": 0, "hidden_dim": None, "dense_hidden_dim": 172,
        "score": "softmax", "select": "before", "renormalise": False, "routed_scale": 1.0, "balancing": "loss",
        "balance_loss": 0.02, "bias_rate": 0.001, "z_loss": 0.001, "sequence_balance_loss": 0.0,
    }  # fmt: skip
    MoE(dim=64, n_layers=2, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_experts": 0}, r"ffn.n_experts=0 is out of range; allowed: 1 or more\."),
        ({"n_experts": 2.5}, r"ffn.n_experts=2.5 is not a whole number\."),
        ({"top_k": 6}, r"ffn.top_k=6 is out of range; allowed: 1 to 5\."),
        ({"top_k": 0}, r"ffn.top_k=0 is out of range; allowed: 1 to 5\."),
        ({"hidden_dim": 0}, r"ffn.hidden_dim=0 is out of range; allowed: 1 or more\."),
        ({"hidden_dim": None, "dense_hidden_dim": 0}, r"ffn.dense_hidden_dim=0 is out of range"),
        ({"shared_experts": -1}, r"ffn.shared_experts=-1 is out of range; allowed: 0 or more\."),
        ({"score": "softmx"}, r"ffn.score='softmx' is not known; allowed: softmax, sigmoid\. Did you mean 'softmax'\?"),
        ({"select": "later"}, r"ffn.select='later' is not known; allowed: before, after\."),
        ({"balancing": "losses"}, r"ffn.balancing='losses' is not known; allowed: loss, bias, none\. Did you mean"),
        (
            {"select": "after", "score": "sigmoid"},
            r"ffn.select=after .* use ffn.select=before and ffn.renormalise=true",
        ),
        ({"routed_scale": -1.0}, r"ffn.routed_scale=-1.0 is out of range; allowed: 0 or more\."),
        ({"balance_loss": -0.1}, r"ffn.balance_loss=-0.1 is out of range"),
        ({"z_loss": -0.1}, r"ffn.z_loss=-0.1 is out of range"),
        ({"sequence_balance_loss": "much"}, r"ffn.sequence_balance_loss='much' is not a number\."),
        ({"bias_rate": -0.1}, r"ffn.bias_rate=-0.1 is out of range"),
    ],
)
def test_refuses_bad_settings_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        MoE(**{**SETTINGS, "n_layers": 2, "dense_hidden_dim": 20, **changes})
    assert "\n" not in str(refusal.value)
