"""Memory+ against a brute-force definition that scores every slot: outputs, every gradient, ties, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import brute_force
from tolerances import assert_close, assert_same_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ffn import FFNContext, MemoryPlus
from pkm_lightning.memory import ValueTable

# Odd sizes; k = 1 and k = n_keys; 1 to 8 heads; one slot only; values narrower and wider than the model.
SIZES: list[dict[str, Any]] = [
    {"dim": 6, "n_keys": 5, "heads": 1, "knn": 1, "key_dim": 4, "value_dim": None},
    {"dim": 7, "n_keys": 5, "heads": 3, "knn": 8, "key_dim": 6, "value_dim": 9},
    {"dim": 10, "n_keys": 9, "heads": 8, "knn": 4, "key_dim": 4, "value_dim": 3},
    {"dim": 5, "n_keys": 11, "heads": 2, "knn": 7, "key_dim": 10, "value_dim": 1},
    {"dim": 3, "n_keys": 1, "heads": 4, "knn": 1, "key_dim": 6, "value_dim": 2},
]


def context(x_BTD: Tensor, *, observe: bool = False) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64), observe=observe)


def build(
    sizes: dict[str, Any], *, qk_norm: bool, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[MemoryPlus, ValueTable]:
    """Builds a layer whose biases, gains and temperatures are not at their initial values."""
    table = ValueTable(rows=sizes["n_keys"] ** 2, dim=sizes["value_dim"] or sizes["dim"])
    layer = MemoryPlus(**sizes, table=table, qk_norm=qk_norm, **options)
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "norm.weight", "temperature")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.to(dtype), table.to(dtype)


def by_brute_force(layer: MemoryPlus, table: ValueTable, x_TD: Tensor, **how: Any) -> Tensor:
    """Computes the reference's output for tokens in float64; `how` may set queries or another rule for ties."""
    p, norm = brute_force.parameters(layer), "rms" if layer.addressing.query.norm is not None else "none"
    heads, knn = layer.addressing.query.heads, layer.addressing.knn
    gate, activation = layer.gate_kind, layer.addressing.activation
    chosen = brute_force.read(p, x_TD, heads=heads, knn=knn, norm=norm, activation=activation, **how)
    return brute_force.memory_plus(p, table.weight.double(), x_TD, chosen, gate)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_brute_force(sizes: dict[str, Any], qk_norm: bool) -> None:
    layer, table = build(sizes, qk_norm=qk_norm)
    x_BTD = torch.randn(2, 5, sizes["dim"], dtype=torch.float64, requires_grad=True)
    output = layer(x_BTD, context(x_BTD))
    expected_BTD = by_brute_force(layer, table, x_BTD.flatten(0, 1)).view_as(x_BTD)
    assert_close(output.y_BTD, expected_BTD)
    inputs = {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())}
    # With one slot read its weight is 1 whatever the scores, so query and keys get a zero gradient.
    if sizes["knn"] == 1:
        addressing = "addressing"
        silent = [p for name, p in layer.named_parameters() if name.startswith(addressing)]
        grads = torch.autograd.grad(output.y_BTD.sum(), silent, retain_graph=True)
        assert not any(bool(grad.any()) for grad in grads)
        inputs = {name: p for name, p in inputs.items() if not name.startswith(addressing)}
    assert_same_gradients(output.y_BTD, expected_BTD, inputs)


@pytest.mark.parametrize("sizes", SIZES)
def test_ties_are_broken_as_documented(sizes: dict[str, Any]) -> None:
    """Draws small integers, so that scores are exact and many are equal in both computations."""
    layer, table = build(sizes, qk_norm=False)
    for parameter in (
        layer.addressing.keys.keys,
        layer.addressing.query.projection.weight,
        layer.addressing.query.projection.bias,
    ):
        parameter.data = torch.randint(-1, 2, parameter.shape).double()
    x_BTD = torch.randint(-1, 2, (3, 4, sizes["dim"])).double().requires_grad_()
    output = layer(x_BTD, context(x_BTD))
    expected_BTD = by_brute_force(layer, table, x_BTD.flatten(0, 1), choose=brute_force.by_rank_in_both_halves).view_as(
        x_BTD
    )
    assert_close(output.y_BTD, expected_BTD)
    assert_close(
        torch.autograd.grad(output.y_BTD.sum(), table.weight)[0],
        torch.autograd.grad(expected_BTD.sum(), table.weight)[0],
        kind="grad",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "sigmoid"},
        {"gate": "none", "temperature": True},
        {"activation": "relu"},
        {"activation": "sigmoid", "temperature": True, "value_projection": True},
        {"value_projection": True},
        {"cures": {"simvq": True}},
    ],
)
@pytest.mark.parametrize("sizes", SIZES[1:3])
def test_every_option_equals_brute_force(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    layer, table = build(sizes, qk_norm=True, **options)
    x_BTD = torch.randn(1, 7, sizes["dim"], dtype=torch.float64, requires_grad=True)
    y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    expected_BTD = by_brute_force(layer, table, x_BTD[0]).view_as(x_BTD)
    assert_close(y_BTD, expected_BTD)
    assert_same_gradients(y_BTD, expected_BTD, {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())})


def test_simvq_asks_for_rows_that_stay_as_drawn() -> None:
    sizes = {"dim": 6, "n_keys": 5, "value_dim": None}
    assert MemoryPlus.table_spec(**sizes).trainable
    assert not MemoryPlus.table_spec(**sizes, cures={"simvq": True}).trainable


def test_two_layers_that_share_a_table_add_up_its_gradient() -> None:
    first, table = build(SIZES[1], qk_norm=True)
    second = MemoryPlus(**SIZES[1], table=table, qk_norm=True).double()
    x_BTD = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    middle_BTD = x_BTD + first(x_BTD, context(x_BTD)).y_BTD
    actual_BTD = second(middle_BTD, context(x_BTD)).y_BTD
    x_TD = x_BTD.flatten(0, 1)
    middle_TD = x_TD + by_brute_force(first, table, x_TD)
    expected_BTD = by_brute_force(second, table, middle_TD).view_as(x_BTD)
    assert_close(actual_BTD, expected_BTD)
    layers = torch.nn.ModuleDict({"first": first, "second": second})
    assert_same_gradients(
        actual_BTD, expected_BTD, {"x": x_BTD, "table": table.weight, **dict(layers.named_parameters())}
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_model_scores_in_fp32_and_is_close_to_float64(qk_norm: bool) -> None:
    layer, table = build(SIZES[1], qk_norm=qk_norm, dtype=torch.bfloat16)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    q_TH2P, _ = layer.addressing.query(x_BTD.flatten(0, 1))
    assert {scores.dtype for scores in layer.addressing.keys(q_TH2P)} == {torch.float32}
    output = layer(x_BTD, context(x_BTD))
    assert output.y_BTD.dtype is torch.bfloat16
    # The same queries go in: rounding them otherwise would choose other slots, which is no error of either side.
    expected_TD = by_brute_force(layer, table, x_BTD.flatten(0, 1).double(), q_THP=q_TH2P.flatten(2).double())
    assert_close(output.y_BTD.flatten(0, 1), expected_TD)


def test_bf16_autocast_scores_in_fp32_and_is_close_to_float64() -> None:
    layer, table = build(SIZES[1], qk_norm=True, dtype=torch.float32)
    x_BTD = torch.randn(2, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_TH2P, _ = layer.addressing.query(x_BTD.flatten(0, 1))
        assert {scores.dtype for scores in layer.addressing.keys(q_TH2P)} == {torch.float32}
        output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["slot_weights"].dtype is torch.float32
    expected_TD = by_brute_force(layer, table, x_BTD.flatten(0, 1).double(), q_THP=q_TH2P.flatten(2).double())
    assert_close(output.y_BTD.flatten(0, 1), expected_TD)


def test_the_trace_holds_slots_and_weights_only_when_observed() -> None:
    layer, _ = build(SIZES[1], qk_norm=True)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.float64)
    assert layer(x_BTD, context(x_BTD)).trace == {}
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    chosen = brute_force.read(brute_force.parameters(layer), x_BTD.flatten(0, 1), heads=3, knn=8, norm="rms")
    assert trace["slot_ids"].dtype is torch.int32
    assert torch.equal(trace["slot_ids"], chosen.ids_THK.view(2, 5, 3, 8).int())
    assert_close(trace["slot_weights"], chosen.weights_THK.view(2, 5, 3, 8).detach())
    assert not trace["slot_weights"].requires_grad


@pytest.mark.parametrize("sizes", SIZES)
def test_cost_is_counted_exactly(sizes: dict[str, Any]) -> None:
    layer, table = build(sizes, qk_norm=True, dtype=torch.float32)
    x_BTD = torch.randn(2, 5, sizes["dim"])
    with FlopCounterMode(display=False) as counter:
        layer(x_BTD, context(x_BTD))
    cost = layer.cost()
    rows_read = sizes["heads"] * sizes["knn"] * table.weight.shape[1]
    assert cost.flops * 10 == counter.get_total_flops()
    assert cost.params == sum(p.numel() for name, p in layer.named_parameters() if "table" not in name)
    assert cost.table_params == table.weight.numel()
    assert cost.active_params == cost.params + rows_read
    assert cost.lookup_bytes == 4 * rows_read
