"""The dense FFN against its formula, and its cost against torch's counter."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import Dense, FFNContext

CONTEXT = FFNContext(torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "squared_relu"])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(6, 11), (7, 1), (1, 5)])
def test_equals_the_formula_with_gradients(dim: int, hidden_dim: int, activation: str) -> None:
    layer = Dense(dim=dim, n_layers=3, hidden_dim=hidden_dim, activation=activation).double()
    x_BTD = torch.randn(2, 5, dim, dtype=torch.float64, requires_grad=True)
    up_BTF = x_BTD @ layer.up.weight.T
    if activation == "swiglu":
        gate_BTF = x_BTD @ layer.gate.weight.T
        hidden_BTF = gate_BTF * torch.sigmoid(gate_BTF) * up_BTF
    elif activation == "gelu":
        hidden_BTF = up_BTF * (1 + torch.erf(up_BTF / 2**0.5)) / 2
    else:
        hidden_BTF = up_BTF * up_BTF * (up_BTF > 0)
    expected_BTD = hidden_BTF @ layer.out.weight.T
    y_BTD = layer(x_BTD, CONTEXT).y_BTD
    assert_close(y_BTD, expected_BTD)
    inputs = [x_BTD, *layer.parameters()]
    upstream_BTD = torch.randn_like(y_BTD)
    actual = torch.autograd.grad(y_BTD, inputs, upstream_BTD)
    for grad, expected in zip(actual, torch.autograd.grad(expected_BTD, inputs, upstream_BTD), strict=True):
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 3), ("gelu", 2), ("squared_relu", 2)])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(6, 11), (7, 1), (33, 50)])
def test_cost_is_counted_exactly(dim: int, hidden_dim: int, activation: str, matrices: int) -> None:
    layer = Dense(dim=dim, n_layers=3, hidden_dim=hidden_dim, activation=activation)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 5, dim), CONTEXT)
    cost = layer.cost()
    assert cost.flops * 10 == counter.get_total_flops()
    expected = matrices * dim * hidden_dim
    assert cost.params == cost.active_params == expected == sum(p.numel() for p in layer.parameters())
    assert (cost.table_params, cost.lookup_bytes) == (0, 0)


def test_initialisation() -> None:
    layer = Dense(dim=64, n_layers=8, hidden_dim=100)
    assert layer.gate.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert layer.up.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert layer.out.weight.std().item() == pytest.approx(100**-0.5 / 4, rel=0.05)


def test_refuses_no_hidden_dimension() -> None:
    with pytest.raises(ConfigError, match=r"ffn.hidden_dim=0 is out of range; allowed: 1 or more\."):
        Dense(dim=6, n_layers=1, hidden_dim=0)


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ConfigError, match=r"ffn.activation='relu' is not known; allowed: swiglu, gelu, squared_relu"):
        Dense(dim=6, n_layers=1, hidden_dim=4, activation="relu")


@pytest.mark.parametrize(
    ("activation", "second_moment"),
    # Of silu(a) b, gelu(a) and relu(a)**2 for independent standard normal a, b.
    [("swiglu", 0.3557), ("gelu", 0.4251), ("squared_relu", 1.5)],
)
def test_initial_output_variance(activation: str, second_moment: float) -> None:
    """Compares with the second moment of the hidden activations over the 2 n_layers branches of the residual stream."""
    layer = Dense(dim=96, n_layers=4, hidden_dim=400, activation=activation)
    y_BTD = layer(torch.randn(16, 64, 96), CONTEXT).y_BTD
    assert y_BTD.var().item() == pytest.approx(second_moment / 8, rel=0.1)
