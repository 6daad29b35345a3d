"""Per-layer embeddings against their formula; `tests/huggingface/test_gemma.py` compares them with Gemma itself.

Letters: L layers, W vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_gradients
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import PLE, FFNContext, TableRead
from pkm_lightning.memory import ValueTable

L, W, DIM, VALUES = 3, 37, 12, 5
SIZES: dict[str, Any] = {
    "dim": DIM, "n_layers": L, "vocab_size": W, "value_dim": VALUES, "context": True, "activation": "gelu_tanh",
    "norm_eps": 1e-6,
}  # fmt: skip


def build(shared: bool = True, **changes: Any) -> tuple[list[PLE], list[ValueTable]]:
    """Returns one plugin per layer with norms of random gains, and the table that they share, or one each."""
    sizes = SIZES | changes
    spec = PLE.table_spec(**sizes, table_readers=L if shared else 1)
    tables = [
        ValueTable(rows=spec.rows, dim=spec.dim, std=spec.std, slices=spec.slices).double()
        for _ in range(1 if shared else L)
    ]
    layers = [
        PLE(**sizes, table=tables[layer % len(tables)], table_reader=layer if shared else 0).double()
        for layer in range(L)
    ]
    for layer in layers:
        for norm in (layer.norm, layer.projection_norm):
            if norm is not None:
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return layers, tables


def inputs() -> tuple[Tensor, FFNContext]:
    x_BTD = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    embedding_BTD = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    return x_BTD, FFNContext(torch.randint(1, W, (2, 7)), embedding_BTD=embedding_BTD)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6).sqrt() * gain


def activated(x: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def by_definition(layer: PLE, row_TV: Tensor, x_BTD: Tensor, context: FFNContext) -> Tensor:
    p_BTV = math.sqrt(VALUES) * row_TV
    if layer.projection is not None and layer.projection_norm is not None:
        assert context.embedding_BTD is not None
        p_BTV = (
            p_BTV + rms(context.embedding_BTD @ layer.projection.weight.T, layer.projection_norm.weight)
        ) / math.sqrt(2)
    gated_BTV = activated(x_BTD @ layer.gate.weight.T, layer.activation) * p_BTV
    return rms(gated_BTV @ layer.up.weight.T, layer.norm.weight)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"context": False}, {"activation": "silu"}, {"activation": "gelu"}], ids=lambda c: str(c)
)
def test_output_and_gradients_equal_the_definition(changes: dict[str, Any], shared: bool) -> None:
    """Reads row x of the embedding of the layer: part of a row of the one table, or a row of the layer's own."""
    layers, tables = build(shared, **changes)
    x_BTD, context = inputs()
    for number, layer in enumerate(layers):
        table = tables[number % len(tables)]
        rows_WLV = table.weight.view(W, -1, VALUES)
        row_TV = rows_WLV[context.input_ids_BT, number if shared else 0]
        y_BTD = layer(x_BTD, context).y_BTD
        expected_BTD = by_definition(layer, row_TV, x_BTD, context)
        assert_close(y_BTD, expected_BTD)
        leaves = {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())}
        if layer.projection is not None:
            leaves["embedding"] = context.embedding_BTD
        assert_same_gradients(y_BTD, expected_BTD, leaves)


def test_the_first_output_has_the_scale_of_the_other_branches() -> None:
    layer = build()[0][1]
    layer.reset_parameters()
    y_BTD = layer(*inputs()).y_BTD
    assert y_BTD.square().mean().item() == pytest.approx(1 / (2 * L), rel=1e-3)


def test_reads_are_the_slices_of_the_tokens_and_slots_are_tokens() -> None:
    layers, (table,) = build()
    _, context = inputs()
    for number, layer in enumerate(layers):
        ((read_table, ids_TK),) = layer.row_ids(context)
        assert read_table is table
        assert ids_TK.tolist() == [[int(token) * L + number] for token in context.input_ids_BT.flatten()]
        assert layer.reads() == [TableRead(table=table, ids=1, groups=1, gather=True)]
        ((slots,), trace) = (layer.slots(), layer(*inputs()[:1], context._replace(observe=True)).trace)
        assert (slots.name, slots.count, slots.tables, slots.n_keys) == ("slot", W, (table,), None)
        assert torch.equal(trace["slot_ids"][..., 0], context.input_ids_BT.int())
        assert bool((trace["slot_weights"] == 1).all())


def test_cost_counts_three_matrices_and_one_slice() -> None:
    cost, without = (build(context=context)[0][0].cost() for context in (True, False))
    matrix = DIM * VALUES
    assert (cost.params, cost.active_params) == (3 * matrix + VALUES + DIM, 3 * matrix + VALUES + DIM + VALUES)
    assert (cost.flops, without.flops) == (6 * matrix, 4 * matrix)
    assert (cost.table_params, cost.lookup_bytes) == (W * L * VALUES, 8 * VALUES)


def test_the_projection_needs_the_token_embedding() -> None:
    x_BTD, context = inputs()
    with pytest.raises(ConfigError, match=r"ffn\.context=true reads the token embeddings, which this model"):
        build()[0][0](x_BTD, context._replace(embedding_BTD=None))
    build(context=False)[0][0](x_BTD, context._replace(embedding_BTD=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, r"ffn.activation='relu' is not known; allowed: gelu_tanh, gelu, silu"),
        ({"context": "no"}, r"ffn.context='no' is neither true nor false"),
        ({"norm_eps": -1.0}, r"ffn.norm_eps=-1.0 is out of range; allowed: 0 or more"),
        ({"value_dim": 0}, r"ffn.value_dim=0 is out of range; allowed: 1 or more"),
        ({"value_dim": 6}, r"shape \(37, 15\), but model.vocab_size=37 and 3 x ffn.value_dim=6 need \(37, 18\)"),
        ({"vocab_size": 40}, r"shape \(37, 15\), but model.vocab_size=40 and 3 x ffn.value_dim=5 need \(40, 15\)"),
        ({"table_reader": 3}, r"table_reader=3 is out of range; allowed: 0 to 2"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    table = ValueTable(rows=W, dim=L * VALUES, slices=L)
    with pytest.raises(ConfigError, match=message):
        PLE(**{**SIZES, "table": table, "table_reader": 0, **changes})


def test_the_default_width_is_an_eighth_of_the_model() -> None:
    for dim, width in ((2048, 256), (64, 8), (5, 1)):
        spec = PLE.table_spec(dim=dim, vocab_size=W, table_readers=4, value_dim=None)
        assert (spec.rows, spec.dim, spec.slices, spec.std) == (W, 4 * width, 4, width**-0.5)
