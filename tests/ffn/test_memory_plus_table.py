"""The table of Memory+ belongs to the model: references, copies, the meta device, initialisation and wrong sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from toys import memory_ffns, memory_plus, token_ids, transformer

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, MemoryPlus
from pkm_lightning.memory import ValueTable


def test_a_model_takes_the_tables_over_from_its_layers() -> None:
    table = ValueTable(rows=49, dim=10)
    layer = memory_plus(table)
    assert layer.state_dict()["values.reference.table.weight"].data_ptr() == table.weight.data_ptr()
    transformer([layer], [table])
    assert not any(parameter is table.weight for parameter in layer.parameters())
    assert not any("table" in name for name in layer.state_dict())
    assert layer.cost().params == sum(p.numel() for p in layer.parameters())


def test_a_model_holds_a_shared_table_once() -> None:
    model = transformer(*memory_ffns())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert [name for name, shape in shapes.items() if shape == (49, 10)] == ["tables.0.weight"]
    assert [name for name, p in model.named_parameters() if p.shape == (49, 10)] == ["tables.0.weight"]


def test_a_copy_shares_within_itself_and_not_with_the_original() -> None:
    model = transformer(*memory_ffns())
    copied = copy.deepcopy(model)
    tables = [block.ffn.values.table for block in copied.blocks[1:]]
    assert tables[0] is tables[1] is copied.tables[0]
    assert copied.tables[0] is not model.tables[0]
    ids_BT = token_ids()
    before_BTD = model(ids_BT).hidden_BTD
    with torch.no_grad():
        copied.tables[0].weight.zero_()
    assert torch.equal(model(ids_BT).hidden_BTD, before_BTD)
    assert not torch.equal(copied(ids_BT).hidden_BTD, before_BTD)


def test_two_models_in_one_process_never_touch_each_other() -> None:
    first, second = transformer(*memory_ffns()), transformer(*memory_ffns())
    ids_BT = token_ids()
    before_BTD = second(ids_BT).hidden_BTD.detach()
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    first(ids_BT).hidden_BTD.square().sum().backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in second.parameters())
    assert torch.equal(second(ids_BT).hidden_BTD, before_BTD)
    assert not torch.equal(first(ids_BT).hidden_BTD, before_BTD)


def test_a_model_built_on_meta_is_complete_after_materialisation() -> None:
    with torch.device("meta"):
        model = transformer(*memory_ffns())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(0)
    built = transformer(*memory_ffns())
    for (name, actual), expected in zip(model.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    ids_BT = token_ids()
    assert torch.equal(model(ids_BT).hidden_BTD, built(ids_BT).hidden_BTD)


def test_runs_on_meta() -> None:
    with torch.device("meta"):
        layer = memory_plus(ValueTable(rows=49, dim=10))
        x_BTD = torch.empty(2, 3, 16)
        assert layer(x_BTD, FFNContext(torch.empty(2, 3, dtype=torch.int64))).y_BTD.shape == (2, 3, 16)


def test_initialisation() -> None:
    layer = MemoryPlus(
        dim=64, table=ValueTable(rows=16, dim=48), n_keys=4, heads=2, knn=2, key_dim=8, value_dim=48, qk_norm=True
    )
    assert layer.gate.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert layer.out.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert not layer.addressing.query.projection.bias.any()


def test_initial_output_variance_is_that_of_its_factors() -> None:
    """Multiplies E[sum w**2] / V of the read (V = D) by the second moment of silu of a standard normal."""
    table = ValueTable(rows=32**2, dim=256)
    layer = MemoryPlus(dim=256, table=table, n_keys=32, heads=4, knn=8, key_dim=16, value_dim=None, qk_norm=True)
    x_BTD = torch.randn(16, 64, 256)
    output = layer(x_BTD, FFNContext(torch.zeros(16, 64, dtype=torch.int64), observe=True))
    read = output.trace["slot_weights"].square().sum((-1, -2)).mean().item() / 256
    assert output.y_BTD.var().item() == pytest.approx(0.3557 * read, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knn": 50}, r"ffn.knn=50 is out of range; allowed: 1 to 49\."),
        ({"knn": 0}, r"ffn.knn=0 is out of range; allowed: 1 to 49\."),
        ({"heads": 0}, r"ffn.heads=0 is out of range"),
        ({"n_keys": 0}, r"ffn.n_keys=0 is out of range; allowed: 1 to 46340\."),
        ({"n_keys": 50_000}, r"ffn.n_keys=50000 is out of range"),
        ({"key_dim": 7}, r"ffn.key_dim=7 is odd; it is split into two half keys: use 8\."),
        ({"key_dim": 0}, r"ffn.key_dim=0 is out of range"),
        ({"value_dim": 0}, r"ffn.value_dim=0 is out of range"),
        ({"value_dim": 9}, r"table has shape \(49, 10\), but ffn.n_keys=7 and ffn.value_dim=9 need \(49, 9\)"),
        ({"n_keys": 8}, r"table has shape \(49, 10\), but ffn.n_keys=8 .* need \(64, 10\): layers that share"),
    ],
)
def test_refuses_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_plus(ValueTable(rows=49, dim=10), **changes)
