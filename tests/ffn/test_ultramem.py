"""UltraMem against a loop over virtual slots: output, every gradient, the spectrum loss, precision, cost, the trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import brute_force_tucker as brute_force
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, UltraMem
from pkm_lightning.memory import ValueTable

# Odd sizes; 1 to 3 heads, ranks and cores; expansions 1, 2 and 4; k = 1 and k = n_keys; half the model dimension.
SIZES: list[dict[str, Any]] = [
    {
        "dim": 7,
        "n_keys": 5,
        "heads": 1,
        "knn": 2,
        "key_dim": 6,
        "value_dim": None,
        "rank": 1,
        "cores": 1,
        "expansion": 1,
    },
    {"dim": 6, "n_keys": 6, "heads": 3, "knn": 4, "key_dim": 10, "value_dim": 8, "rank": 2, "cores": 2, "expansion": 4},
    {"dim": 5, "n_keys": 4, "heads": 2, "knn": 6, "key_dim": 8, "value_dim": 9, "rank": 3, "cores": 3, "expansion": 2},
    {"dim": 8, "n_keys": 9, "heads": 1, "knn": 1, "key_dim": 4, "value_dim": 2, "rank": 2, "cores": 1, "expansion": 3},
]


def whole_rows(table: ValueTable) -> Tensor:
    """Returns whole rows, (rows, dim), of a table whose weight has one line per slice."""
    return table.weight.view(table.rows, table.dim)


def context(x_BTD: Tensor, *, observe: bool = False) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64), observe=observe)


def build(
    sizes: dict[str, Any], *, dtype: torch.dtype = torch.float64, random: bool = True, **changes: Any
) -> tuple[UltraMem, ValueTable]:
    """Builds a layer and its table; `random` draws gains and cores instead of their initial values."""
    arguments = {"n_layers": 3, "spectrum_loss": 0.5, "spectrum_margin": 0.15, **sizes, **changes}
    spec = UltraMem.table_spec(**arguments)
    table = ValueTable(rows=spec.rows, dim=spec.dim, std=spec.std, slices=spec.slices)
    layer = UltraMem(table=table, **arguments)
    if random:
        torch.nn.init.normal_(layer.keys.cores)
        for parameter in (layer.keys.query_norm.weight, layer.keys.key_norm.weight):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.to(dtype), table.to(dtype)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_brute_force(sizes: dict[str, Any], shape: tuple[int, int]) -> None:
    layer, table = build(sizes)
    x_BTD = torch.randn(*shape, sizes["dim"], dtype=torch.float64, requires_grad=True)
    actual_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    expected_BTD = brute_force.ultramem(layer, whole_rows(table), x_BTD.flatten(0, 1)).view_as(x_BTD)
    assert_close(actual_BTD, expected_BTD)
    inputs = {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())}
    upstream_BTD = torch.randn_like(expected_BTD)
    actual_grads = torch.autograd.grad(actual_BTD, list(inputs.values()), upstream_BTD)
    expected_grads = torch.autograd.grad(expected_BTD, list(inputs.values()), upstream_BTD)
    for name, actual, expected in zip(inputs, actual_grads, expected_grads, strict=True):
        assert expected.any(), f"the test gives no gradient to {name}"
        assert_close(actual, expected, kind="grad")


@pytest.mark.parametrize("sizes", SIZES)
def test_the_spectrum_loss_and_its_gradient_only_in_training(sizes: dict[str, Any]) -> None:
    layer, _ = build(sizes)
    x_BTD = torch.randn(2, 3, sizes["dim"], dtype=torch.float64)
    losses = layer(x_BTD, context(x_BTD)).aux_losses
    assert layer.eval()(x_BTD, context(x_BTD)).aux_losses == {}
    assert build(sizes, spectrum_loss=0.0)[0](x_BTD, context(x_BTD)).aux_losses == {}
    if sizes["rank"] == 1:
        assert losses == {}
        return
    expected = brute_force.spectrum_loss(layer.keys, 0.5, 0.15)
    assert expected > 0
    assert_close(losses["spectrum"], expected)
    cores = layer.keys.cores
    expected_grad = torch.autograd.grad(expected, cores)[0]
    assert_close(torch.autograd.grad(losses["spectrum"], cores)[0], expected_grad, kind="grad")


def test_the_spectrum_loss_forgives_singular_values_below_the_margin() -> None:
    layer, _ = build(SIZES[1], spectrum_margin=100.0)
    x_BTD = torch.randn(2, 3, 6, dtype=torch.float64)
    assert layer(x_BTD, context(x_BTD)).aux_losses["spectrum"] == 0


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_bf16_model_is_close_to_float64(sizes: dict[str, Any]) -> None:
    layer, table = build(sizes, dtype=torch.bfloat16, random=False)
    assert layer.shuffle.dtype is torch.int32
    x_BTD = torch.randn(2, 5, sizes["dim"], dtype=torch.bfloat16)
    output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["slot_weights"].dtype is torch.float32
    # The same queries go in: rounding them otherwise would choose other slots, which is no error of either side.
    q_TF = layer.keys.query(x_BTD.flatten(0, 1)).double()
    wide, _ = layer.double(), table.double()
    expected_TD = brute_force.ultramem(wide, whole_rows(table), x_BTD.flatten(0, 1).double(), q_TF)
    assert_close(output.y_BTD.flatten(0, 1), expected_TD)


def test_autocast_is_close_to_float64_and_gives_fp32_gradients() -> None:
    layer, table = build(SIZES[1], dtype=torch.float32, random=False)
    x_BTD = torch.randn(2, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_TF = layer.keys.query(x_BTD.flatten(0, 1)).double()
        output = layer(x_BTD, context(x_BTD))
    assert output.y_BTD.dtype is torch.bfloat16
    (output.y_BTD.float().square().mean() + output.aux_losses["spectrum"]).backward()
    assert {p.grad.dtype for p in (*layer.parameters(), table.weight) if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in (*layer.parameters(), table.weight))
    expected_TD = brute_force.ultramem(layer.double(), whole_rows(table.double()), x_BTD.flatten(0, 1).double(), q_TF)
    assert_close(output.y_BTD.flatten(0, 1), expected_TD)


def test_the_trace_holds_rows_slots_and_scores_only_when_observed() -> None:
    layer, table = build(SIZES[1])
    x_BTD = torch.randn(2, 5, 6, dtype=torch.float64)
    assert layer(x_BTD, context(x_BTD)).trace == {}
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    scores = brute_force.all_scores(layer.keys, x_BTD.flatten(0, 1))
    ids_THK = brute_force.two_stage(scores, 4)
    assert {name: tuple(part.shape) for name, part in trace.items()} == dict.fromkeys(trace, (2, 5, 3, 4))
    assert trace["slot_ids"].dtype is trace["virtual_ids"].dtype is torch.int32
    assert torch.equal(trace["virtual_ids"].flatten(0, 1), ids_THK.int())
    assert torch.equal(trace["slot_ids"].flatten(0, 1), layer.shuffle[ids_THK] % table.rows)
    assert_close(trace["slot_weights"].flatten(0, 1), scores.grid_THCA.sum(2).gather(-1, ids_THK).detach())
    assert not any(part.requires_grad for part in trace.values())


def test_every_row_has_as_many_virtual_slots_of_each_projector_once() -> None:
    layer, table = build(SIZES[1])
    assert torch.equal(layer.shuffle.sort().values, torch.arange(36, dtype=torch.int32))
    assert not torch.equal(layer.shuffle, torch.arange(36, dtype=torch.int32))
    assert table.rows == 9


@pytest.mark.parametrize("sizes", SIZES)
def test_cost_is_counted_exactly(sizes: dict[str, Any]) -> None:
    layer, table = build(sizes, dtype=torch.float32)
    x_BTD = torch.randn(2, 5, sizes["dim"])
    with FlopCounterMode(display=False) as counter:
        layer(x_BTD, context(x_BTD))
    cost = layer.cost()
    values_read = sizes["heads"] * sizes["knn"] * table.dim
    assert cost.flops * 10 == counter.get_total_flops()
    assert cost.params == sum(p.numel() for name, p in layer.named_parameters() if "table" not in name)
    assert cost.table_params == table.weight.numel()
    assert cost.active_params == cost.params + values_read
    assert cost.lookup_bytes == 4 * values_read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 7}, r"ffn.rank=7 is above the number of keys, ffn.n_keys=6, .*; set ffn.rank to 1 to n_keys\."),
        ({"rank": 0}, r"ffn.rank=0 is out of range"),
        ({"knn": 37}, r"ffn.knn=37 is out of range; allowed: 1 to 36\."),
        ({"heads": 0}, r"ffn.heads=0 is out of range"),
        ({"n_keys": 50_000}, r"ffn.n_keys=50000 is out of range; allowed: 1 to 46340\."),
        ({"key_dim": 0}, r"ffn.key_dim=0 is out of range"),
        ({"cores": 0}, r"ffn.cores=0 is out of range"),
        ({"cores": 3}, r"ffn.value_dim=8 gives 8 values per row, which ffn.cores=3 .*; use ffn.value_dim=9\."),
        (
            {"value_dim": None, "dim": 7},
            r"ffn.value_dim=None gives 3 values per row, which ffn.cores=2 .*value_dim=4\.",
        ),
        ({"value_dim": 0}, r"ffn.value_dim=0 is out of range"),
        ({"expansion": 5}, r"ffn.expansion=5 does not divide the 36 slots of ffn.n_keys=6; .* or ffn.n_keys=5\."),
        ({"expansion": 0}, r"ffn.expansion=0 is out of range"),
        ({"expansion": 1.5}, r"ffn.expansion=1.5 is not a whole number"),
        ({"spectrum_loss": -1.0}, r"ffn.spectrum_loss=-1.0 is out of range"),
        ({"spectrum_margin": -1.0}, r"ffn.spectrum_margin=-1.0 is out of range"),
    ],
)
def test_refuses_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(SIZES[1], **changes)
    assert "\n" not in str(raised.value)


def test_refuses_a_table_of_another_shape() -> None:
    arguments = {"n_layers": 3, "spectrum_loss": 0.0, "spectrum_margin": 0.0, **SIZES[1]}
    message = (
        r"table has shape \(36, 8\), but ffn.n_keys=6, ffn.expansion=4, ffn.cores=2 and ffn.value_dim=8 need \(9, 8\)"
    )
    with pytest.raises(ConfigError, match=message):
        UltraMem(table=ValueTable(rows=36, dim=8), **arguments)
