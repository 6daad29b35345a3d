"""STEM against its formula, and its cost against that of the SwiGLU that it replaces.

Letters: F hidden dimension, W vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_gradients

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import STEM, Dense, FFNContext, TableRead
from pkm_lightning.memory import ValueTable

W, DIM, F = 37, 12, 17
SIZES: dict[str, Any] = {"dim": DIM, "n_layers": 2, "vocab_size": W, "hidden_dim": F}


def build() -> tuple[STEM, ValueTable]:
    spec = STEM.table_spec(**SIZES)
    table = ValueTable(rows=spec.rows, dim=spec.dim, std=spec.std).double()
    return STEM(**SIZES, table=table).double(), table


def test_output_and_gradients_equal_the_definition() -> None:
    layer, table = build()
    x_BTD = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    context = FFNContext(torch.randint(W, (2, 7)))
    gate_BTF = x_BTD @ layer.gate.weight.T
    expected_BTD = (gate_BTF / (1 + torch.exp(-gate_BTF)) * table.weight[context.input_ids_BT]) @ layer.out.weight.T
    y_BTD = layer(x_BTD, context).y_BTD
    assert_close(y_BTD, expected_BTD)
    assert_same_gradients(y_BTD, expected_BTD, {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())})


def test_a_table_with_the_products_of_an_up_projection_gives_the_swiglu() -> None:
    """Compares where h follows from the token: a row that is W_up h makes both networks one function."""
    layer, table = build()
    dense = Dense(dim=DIM, n_layers=2, hidden_dim=F).double()
    assert dense.gate is not None
    hidden_WD = torch.randn(W, DIM, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.copy_(dense.gate.weight)
        layer.out.weight.copy_(dense.out.weight)
        table.weight.copy_(dense.up(hidden_WD))
    context = FFNContext(torch.randint(W, (2, 7)))
    x_BTD = hidden_WD[context.input_ids_BT]
    assert_close(layer(x_BTD, context).y_BTD, dense(x_BTD, context).y_BTD)


def test_it_starts_with_the_output_variance_of_the_swiglu() -> None:
    sizes = {"dim": 64, "n_layers": 3}
    spec = STEM.table_spec(vocab_size=2000, hidden_dim=172)
    table = ValueTable(rows=2000, dim=172, std=spec.std)
    layer, dense = STEM(**sizes, vocab_size=2000, hidden_dim=172, table=table), Dense(**sizes, hidden_dim=172)
    x_BTD, context = torch.randn(4, 250, 64), FFNContext(torch.randint(2000, (4, 250)))
    variances = [plugin(x_BTD, context).y_BTD.var().item() for plugin in (layer, dense)]
    assert variances[0] == pytest.approx(variances[1], rel=0.1)


def test_a_third_of_matrices_and_flops_is_saved_and_the_table_read_instead() -> None:
    cost, dense = build()[0].cost(), Dense(dim=DIM, n_layers=2, hidden_dim=F).cost()
    assert (cost.params, cost.flops) == (dense.params * 2 / 3, dense.flops * 2 / 3)
    assert (cost.table_params, cost.active_params, cost.lookup_bytes) == (W * F, cost.params + F, 8 * F)


def test_reads_are_the_rows_of_the_tokens() -> None:
    layer, table = build()
    x_BTD, context = torch.randn(2, 3, DIM, dtype=torch.float64), FFNContext(torch.randint(W, (2, 3)), observe=True)
    ((read_table, ids_TK),) = layer.row_ids(context)
    assert read_table is table
    assert torch.equal(ids_TK, context.input_ids_BT.view(6, 1))
    assert layer.reads() == [TableRead(table=table, ids=1, groups=1, gather=True)]
    ((slots,), trace) = (layer.slots(), layer(x_BTD, context).trace)
    assert (slots.name, slots.count, slots.tables) == ("slot", W, (table,))
    assert torch.equal(trace["slot_ids"], context.input_ids_BT.unsqueeze(-1).int())
    assert bool((trace["slot_weights"] == 1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 0}, r"ffn.hidden_dim=0 is out of range; allowed: 1 or more"),
        ({"hidden_dim": 9}, r"shape \(37, 17\), but model.vocab_size=37 and ffn.hidden_dim=9 need \(37, 9\)"),
        ({"vocab_size": 38}, r"shape \(37, 17\), but model.vocab_size=38 and ffn.hidden_dim=17 need \(38, 17\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        STEM(**{**SIZES, "table": ValueTable(rows=W, dim=F), **changes})
