"""Plugins in a program of the user's own: they own their tables, need no builder or context, and refuse in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

import pkm_lightning
from pkm_lightning import ConfigError, FFNContext, MemoryPlus, ValueTable
from pkm_lightning.ffn import HasRowIds
from pkm_lightning.ffn.base import NO_CONTEXT

DIM, VOCAB = 12, 30
#: Arguments of each plugin besides `dim`.
LAYERS: dict[str, dict[str, Any]] = {
    "Dense": {"hidden_dim": 9},
    "Engram": {"vocab_size": VOCAB, "rows": 20},
    "ExpertChoiceMoE": {"dense_hidden_dim": 9, "n_experts": 3},
    "Memory": {"n_keys": 9},
    "MemoryPlus": {"n_keys": 9},
    "MoE": {"dense_hidden_dim": 9, "n_experts": 3, "top_k": 2},
    "PEER": {"n_keys": 9, "glu": True},
    "PKM": {"n_keys": 9},
    "PLE": {"vocab_size": VOCAB, "context": False},
    "STEM": {"vocab_size": VOCAB, "hidden_dim": 9},
    "UltraMem": {"n_keys": 10},
    "UltraMemV2": {"n_keys": 9},
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **changes: Any) -> nn.Module:
    layer: nn.Module = getattr(pkm_lightning, name)(**{"dim": DIM, **LAYERS[name], **changes})
    return layer


def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


def run(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    output = layer(x_BTD, FFNContext(ids())) if isinstance(layer, HasRowIds) else layer(x_BTD)
    y_BTD: Tensor = output.y_BTD
    return y_BTD


@EVERY
def test_its_state_holds_everything_that_decides_its_output(name: str) -> None:
    layer, x_BTD = make(name).eval(), torch.randn(2, 5, DIM)
    other = make(name).eval()
    assert not torch.equal(run(other, x_BTD), run(layer, x_BTD))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, x_BTD), run(layer, x_BTD))
    # A table is a parameter that learns, and copies share none.
    copied = copy.deepcopy(layer)
    tables = [module for module in copied.modules() if isinstance(module, ValueTable)]
    assert len(tables) == {"PEER": 3, "UltraMemV2": 2, "Dense": 0, "MoE": 0, "ExpertChoiceMoE": 0}.get(name, 1)
    run(copied, x_BTD).sum().backward()
    assert all(table.weight.grad is not None and table.weight.grad.any() for table in tables)
    assert all(parameter.grad is None for parameter in layer.parameters())


@EVERY
def test_tokens_in_a_row_are_a_sequence(name: str) -> None:
    layer, x_BTD = make(name).eval(), torch.randn(2, 5, DIM)
    if isinstance(layer, HasRowIds):
        with pytest.raises(ConfigError, match=rf"^{name} needs a token id for each of x.*\(2, 5\).*\(10, 12\)\.$"):
            layer(x_BTD.flatten(0, 1), FFNContext(ids()))
        with pytest.raises(ConfigError, match=rf"^{name} reads rows by token id, .* layer\(x, FFNContext\(input_ids\)"):
            layer(x_BTD)
        return
    expected_BTD = run(layer, x_BTD)
    assert_close(layer(x_BTD.flatten(0, 1)).y_BTD, expected_BTD.flatten(0, 1))
    assert torch.equal(layer(x_BTD, NO_CONTEXT).y_BTD, expected_BTD)


@EVERY
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(2, 5, DIM + 1),
            r"takes x of shape \(B, T, 12\) or \(T, 12\), not \(2, 5, 13\); build .* dim=13\.$",
        ),
        (torch.zeros(DIM), r"not \(12,\); flatten it to tokens\.$"),
        (torch.zeros(2, DIM, 3, 3), r"for features \(B, C, H, W\) pass x\.flatten\(2\)\.transpose\(1, 2\)\.$"),
    ],
    ids=["width", "vector", "image"],
)
def test_another_shape_is_refused(name: str, x: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} .*{message}"):
        make(name)(x, FFNContext(ids()))


def test_another_dtype_or_device_is_refused_and_autocast_is_not() -> None:
    layer, x_TD = make("MemoryPlus"), torch.zeros(5, DIM)
    with pytest.raises(
        ConfigError, match=r"^x is torch.float64 on cpu, but the weights of MemoryPlus are torch.float32 "
    ):
        layer(x_TD.double())
    with pytest.raises(ConfigError, match=r"on meta, .* as in layer\.to\('meta', torch.float32\)"):
        layer(x_TD.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x_TD.bfloat16())
    layer.double()(x_TD.double())


def test_two_layers_share_the_table_that_both_are_given() -> None:
    table = ValueTable(rows=81, dim=DIM)
    layers = nn.ModuleList(make("MemoryPlus", table=table) for _ in range(2))
    assert sum(p.numel() for p in layers.parameters() if p.shape == (81, DIM)) == 81 * DIM
    assert [name for name, value in layers.state_dict().items() if value.data_ptr() == table.weight.data_ptr()] == [
        "0.values.reference.table.weight",
        "1.values.reference.table.weight",
    ]
    other = copy.deepcopy(layers)
    other.load_state_dict(layers.state_dict())
    assert other[0].values.table is other[1].values.table  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": ValueTable(rows=80, dim=DIM)}, r"^table has shape \(80, 12\), but ffn.n_keys=9 .* need \(81, 12\)"),
        (
            {"table": nn.Embedding(81, DIM)},
            r"^table=Embedding\(81, 12\) is no ValueTable; .*rows=81, dim=12\), or makes",
        ),
        (
            {"table": ValueTable(rows=81, dim=DIM, slices=2)},
            r"^table has 2 slices per row, .* make it with slices=1\.$",
        ),
    ],
)
def test_another_table_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("MemoryPlus", **changes)


def test_an_unknown_argument_is_refused_by_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_key'"):
        MemoryPlus(dim=DIM, n_key=9)  # type: ignore[call-arg]
