"""UltraMemV2 against a loop over slots: output, every gradient, balance loss, precision, cost, model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import brute_force_tucker as brute_force
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toys import DIM, config, dense, token_ids, transformer

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import Dense, FFNContext, UltraMemV2
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.tucker_keys import selected_moments
from pkm_lightning.model.plugin_outputs import ParallelFFN

# Odd sizes; 1 to 3 heads and ranks; k = 1 and k = n_keys; a quarter of the model dimension.
SIZES: list[dict[str, Any]] = [
    {"dim": 9, "n_keys": 5, "heads": 1, "knn": 3, "key_dim": 6, "value_dim": None, "rank": 2},
    {"dim": 6, "n_keys": 6, "heads": 3, "knn": 4, "key_dim": 10, "value_dim": 6, "rank": 3, "cores": 3},
    {"dim": 5, "n_keys": 4, "heads": 2, "knn": 6, "key_dim": 8, "value_dim": 1, "rank": 1},
    {"dim": 8, "n_keys": 9, "heads": 1, "knn": 1, "key_dim": 4, "value_dim": 11, "rank": 2},
]


def context(x_BTD: Tensor, *, observe: bool = False, valid_BT: Tensor | None = None) -> FFNContext:
    ids_BT = torch.empty(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
    return FFNContext(ids_BT, valid_BT=valid_BT, observe=observe)


def build(
    sizes: dict[str, Any], *, dtype: torch.dtype = torch.float64, random: bool = True, **changes: Any
) -> tuple[UltraMemV2, list[ValueTable]]:
    """Builds a layer and its two tables; `random` draws gains and cores instead of their initial values."""
    arguments = {"n_layers": 3, "balance_loss": 0.5, **sizes, **changes}
    spec = UltraMemV2.table_spec(**arguments)
    shape = {"rows": spec.rows, "dim": spec.dim, "std": spec.std, "slices": spec.slices}
    tables = [ValueTable(**shape).to(dtype) for _ in range(spec.count)]
    layer = UltraMemV2(table=tables, **arguments)
    if random:
        torch.nn.init.normal_(layer.keys.cores)
        for parameter in (layer.keys.query_norm.weight, layer.keys.key_norm.weight):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.to(dtype), tables


@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_brute_force(sizes: dict[str, Any], shape: tuple[int, int]) -> None:
    layer, (pre_values, values) = build(sizes)
    x_BTD = torch.randn(*shape, sizes["dim"], dtype=torch.float64, requires_grad=True)
    actual_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    x_TD = x_BTD.flatten(0, 1)
    expected_BTD = brute_force.ultramem_v2(layer, pre_values.weight, values.weight, x_TD).view_as(x_BTD)
    assert_close(actual_BTD, expected_BTD)
    parameters = dict(layer.named_parameters())
    inputs = {"x": x_BTD, "pre-values": pre_values.weight, "values": values.weight, **parameters}
    upstream_BTD = torch.randn_like(expected_BTD)
    actual_grads = torch.autograd.grad(actual_BTD, list(inputs.values()), upstream_BTD)
    expected_grads = torch.autograd.grad(expected_BTD, list(inputs.values()), upstream_BTD)
    for name, actual, expected in zip(inputs, actual_grads, expected_grads, strict=True):
        assert expected.any(), f"the test gives no gradient to {name}"
        assert_close(actual, expected, kind="grad")


@pytest.mark.parametrize(("padding", "counts"), [(False, "reads"), (True, "reads"), (True, "preselected")])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_balance_loss_and_its_gradients_leave_padding_out(
    sizes: dict[str, Any], padding: bool, counts: str
) -> None:
    layer, _ = build(sizes, balance_counts=counts)
    x_BTD = torch.randn(2, 5, sizes["dim"], dtype=torch.float64, requires_grad=True)
    valid_BT = torch.ones(2, 5, dtype=torch.bool)
    if padding:
        valid_BT[0, 3:] = valid_BT[1, 1:] = False
    loss = layer(x_BTD, context(x_BTD, valid_BT=valid_BT if padding else None)).aux_losses["balance"]
    expected = brute_force.balance_loss(layer.keys, x_BTD.flatten(0, 1), valid_BT.flatten(), 0.5, counts)
    assert_close(loss, expected)
    inputs = [x_BTD, layer.keys.query.weight, layer.keys.keys, layer.keys.query_norm.weight, layer.keys.key_norm.weight]
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert_close(actual, wanted, kind="grad")


def test_the_balance_loss_only_in_training_and_only_if_asked_for() -> None:
    layer, _ = build(SIZES[1])
    x_BTD = torch.randn(2, 5, 6, dtype=torch.float64)
    assert set(layer(x_BTD, context(x_BTD)).aux_losses) == {"balance"}
    assert layer.eval()(x_BTD, context(x_BTD)).aux_losses == {}
    assert build(SIZES[1], balance_loss=0.0)[0](x_BTD, context(x_BTD)).aux_losses == {}
    nothing = context(x_BTD, valid_BT=torch.zeros(2, 5, dtype=torch.bool))
    assert layer.train()(x_BTD, nothing).aux_losses["balance"] == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_and_autocast_are_close_to_float64(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, tables = build(SIZES[1], dtype=dtype, random=False)
    x_BTD = torch.randn(2, 5, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        q_TF = layer.keys.query(x_BTD.flatten(0, 1)).double()
        output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["slot_weights"].dtype is torch.float32
    (output.y_BTD.float().square().mean() + output.aux_losses["balance"]).backward()
    owned = [*layer.parameters(), *(table.weight for table in tables)]
    assert {p.grad.dtype for p in owned if p.grad is not None} == {dtype}
    assert all(p.grad is not None for p in owned)
    pre_values_AV, values_AV = (table.double().weight for table in tables)
    # The same queries go in: rounding them otherwise would choose other slots, which is no error of either side.
    expected_TD = brute_force.ultramem_v2(layer.double(), pre_values_AV, values_AV, x_BTD.flatten(0, 1).double(), q_TF)
    assert_close(output.y_BTD.flatten(0, 1), expected_TD)


def test_the_trace_holds_slots_and_scores_only_when_observed() -> None:
    layer, _ = build(SIZES[1])
    x_BTD = torch.randn(2, 5, 6, dtype=torch.float64)
    assert layer(x_BTD, context(x_BTD)).trace == {}
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    scores = brute_force.all_scores(layer.keys, x_BTD.flatten(0, 1))
    ids_THK = brute_force.two_stage(scores, 4)
    assert torch.equal(trace["slot_ids"], ids_THK.view(2, 5, 3, 4).int())
    assert trace["slot_ids"].dtype is torch.int32
    assert_close(trace["slot_weights"], scores.grid_THCA.sum(2).gather(-1, ids_THK).view(2, 5, 3, 4).detach())
    assert not trace["slot_weights"].requires_grad


@pytest.mark.parametrize("sizes", SIZES)
def test_cost_is_counted_exactly(sizes: dict[str, Any]) -> None:
    layer, tables = build(sizes, dtype=torch.float32)
    x_BTD = torch.randn(2, 5, sizes["dim"])
    with FlopCounterMode(display=False) as counter:
        layer(x_BTD, context(x_BTD))
    cost = layer.cost()
    values_read = 2 * sizes["heads"] * sizes["knn"] * tables[0].dim
    assert cost.flops * 10 == counter.get_total_flops()
    assert cost.params == sum(p.numel() for name, p in layer.named_parameters() if "table" not in name)
    assert cost.table_params == 2 * tables[0].weight.numel()
    assert cost.active_params == cost.params + values_read
    assert cost.lookup_bytes == 4 * values_read


@pytest.mark.parametrize(
    "changes",
    [{"cores": 2}, {"heads": 3, "rank": 1, "knn": 4}, {"n_keys": 128, "knn": 32, "rank": 3, "n_layers": 7}],
)
def test_the_variance_of_a_fresh_output(changes: dict[str, Any]) -> None:
    """Allows 25% around 0.2 / n_layers, since the estimate of the scores ignores their spread over tokens."""
    sizes = {"dim": 96, "n_keys": 64, "heads": 1, "knn": 16, "key_dim": 64, "value_dim": 48, "rank": 2, "n_layers": 4}
    sizes |= changes
    layer, tables = build(sizes, dtype=torch.float32, random=False)
    x_BTD = torch.randn(4, 200, 96)
    n_layers = sizes["n_layers"]
    assert layer(x_BTD, context(x_BTD)).y_BTD.var().item() == pytest.approx(0.2 / n_layers, rel=0.25)
    _, spread = selected_moments(sizes["n_keys"], sizes["knn"])
    std = (0.2 / (n_layers * sizes["knn"] * sizes["heads"] * (1 + spread))) ** 0.5
    assert tables[1].weight.std().item() == pytest.approx(std, rel=0.02)
    neurons_TK = tables[0].weight.view(-1, 48)[:100] @ layer.pre(x_BTD.flatten(0, 1)).T
    assert neurons_TK.var().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("write_after", [0, 1])
def test_beside_the_ffn_at_once_or_later(write_after: int) -> None:
    sizes = {"dim": DIM, "n_keys": 5, "heads": 1, "knn": 3, "key_dim": 8, "value_dim": 4, "rank": 2}
    layer, tables = build(sizes, dtype=torch.float32, n_layers=2)
    ffns = [ParallelFFN(dense(2), layer, defer=write_after > 0), dense(2)]
    model = transformer(ffns, tables, write_after=write_after)
    memory, last = [], []
    layer.register_forward_hook(lambda _, __, output: memory.append(output.y_BTD))
    model.blocks[1].register_forward_hook(lambda _, __, output: last.append(output.y_BTD))
    hidden_BTD = model(token_ids()).hidden_BTD
    late_BTD = memory[0] if write_after else torch.zeros_like(memory[0])
    assert_close(hidden_BTD, model.norm(last[0] + late_BTD))


def test_the_configuration_puts_it_beside_every_ffn() -> None:
    composed = config("ffn=ultramem_v2", "model.memory.n_keys=16")
    for shared, tables in ((True, 2), (False, 6)):
        composed["table"]["shared"] = shared
        model = build_model(composed)
        assert all(isinstance(block.ffn, ParallelFFN) and isinstance(block.ffn.base, Dense) for block in model.blocks)
        assert [tuple(table.weight.shape) for table in model.tables] == [(256, 16)] * tables
        assert {block.ffn.variant.keys.heads for block in model.blocks} == {1}
    assert build_meta_model(composed).blocks[2].ffn.variant.cost().table_params == 2 * 256 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 7}, r"ffn.rank=7 is above the number of keys, ffn.n_keys=6, .*; set ffn.rank to 1 to n_keys\."),
        ({"knn": 37}, r"ffn.knn=37 is out of range; allowed: 1 to 36\."),
        ({"heads": 0}, r"ffn.heads=0 is out of range"),
        ({"n_keys": 0}, r"ffn.n_keys=0 is out of range; allowed: 1 to 46340\."),
        ({"key_dim": 0}, r"ffn.key_dim=0 is out of range"),
        ({"value_dim": 0}, r"ffn.value_dim=0 is out of range"),
        ({"balance_loss": -0.1}, r"ffn.balance_loss=-0.1 is out of range"),
        ({"cores": 4}, r"ffn.value_dim=6 gives 6 values per row, which ffn.cores=4 does not divide"),
        ({"balance_counts": "all"}, r"ffn.balance_counts='all' is not known; allowed: reads, preselected"),
    ],
)
def test_refuses_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SIZES[1], **changes)


def test_refuses_other_tables() -> None:
    good, bad = ValueTable(rows=36, dim=6), ValueTable(rows=36, dim=8)
    for table, message in (
        (good, r"^UltraMemV2 needs a list of 2 tables \(ffn.n_keys=6"),
        ([good], r"^UltraMemV2 needs a list of 2 tables"),
        ([good, bad], r"table has shape \(36, 8\), but ffn.n_keys=6, ffn.cores=3 and ffn.value_dim=6 need \(36, 6\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            UltraMemV2(table=table, n_layers=3, balance_loss=0.0, **SIZES[1])  # type: ignore[arg-type]
