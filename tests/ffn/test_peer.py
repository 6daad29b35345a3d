"""PEER against a definition that runs every expert: outputs, every gradient, routers, GLU experts, precision.

Letters: K experts per head, N experts.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from ffn import brute_force
from tolerances import assert_close, assert_same_gradients
from torch import Tensor
from tree import ROOT

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import PEER, FFNContext
from pkm_lightning.memory import ValueTable

SIZES: list[dict[str, Any]] = [
    {"dim": 7, "n_keys": 5, "heads": 3, "knn": 8, "key_dim": 6},
    {"dim": 10, "n_keys": 9, "heads": 8, "knn": 4, "key_dim": 4},
    {"dim": 4, "n_keys": 6, "heads": 1, "knn": 2, "key_dim": 4},
]


def build(
    sizes: dict[str, Any], *, glu: bool = False, norm: str = "batch", router: str = "softmax", shared: bool = True
) -> tuple[PEER, list[ValueTable]]:
    spec = PEER.table_spec(dim=sizes["dim"], n_keys=sizes["n_keys"], glu=glu)
    tables = [ValueTable(rows=spec.rows, dim=spec.dim).double() for _ in range(spec.count)]
    layer = PEER(**sizes, table=tables, query_norm=norm, router=router, glu=glu, shared_keys=shared)
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.double(), tables


def by_definition(
    layer: PEER, tables: list[ValueTable], x_TD: Tensor, norm: str, router: str, q_THP: Tensor | None = None
) -> Tensor:
    """Runs every expert for every token and weights those not selected with zero."""
    sizes = {"heads": layer.addressing.query.heads, "knn": layer.addressing.knn}
    chosen = brute_force.read(brute_force.parameters(layer), x_TD, **sizes, norm=norm, activation=router, q_THP=q_THP)
    experts = tables[0].weight.shape[0]
    weights_TN = torch.zeros(len(x_TD), experts, dtype=torch.float64).scatter_add(
        1, chosen.ids_THK.flatten(1), chosen.weights_THK.flatten(1)
    )
    down, *gates, up = (table.weight.double() for table in tables)
    a_TN = x_TD @ down.T
    hidden_TN = a_TN * (1 + torch.erf(a_TN / math.sqrt(2))) / 2
    for gate in gates:
        hidden_TN = hidden_TN * (x_TD @ gate.T)
    return (weights_TN * hidden_TN) @ up


def context(x_BTD: Tensor) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64))


@pytest.mark.parametrize(
    ("glu", "router", "shared"), [(False, "softmax", True), (True, "sigmoid", True), (False, "softmax", False)]
)
@pytest.mark.parametrize("norm", ["batch", "rms", "layer", "none"])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_the_definition(
    sizes: dict[str, Any], norm: str, router: str, glu: bool, shared: bool
) -> None:
    layer, tables = build(sizes, glu=glu, norm=norm, router=router, shared=shared)
    x_BTD = torch.randn(2, 5, sizes["dim"], dtype=torch.float64, requires_grad=True)
    y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    expected_BTD = by_definition(layer, tables, x_BTD.flatten(0, 1), norm, router).view_as(x_BTD)
    assert_close(y_BTD, expected_BTD)
    named = {f"table{i}": table.weight for i, table in enumerate(tables)}
    assert_same_gradients(y_BTD, expected_BTD, {"x": x_BTD, **named, **dict(layer.named_parameters())})


def test_heads_share_the_keys_and_have_queries_of_their_own() -> None:
    layer, _ = build(SIZES[0])
    assert layer.addressing.keys.keys.shape == (1, 2, 5, 3)
    assert layer.addressing.query.projection.out_features == 3 * 6


def test_keys_per_head_find_other_experts_for_equal_queries() -> None:
    """Gives all heads one query: heads that share keys then read the same experts, and others do not."""
    for shared in (True, False):
        layer, _ = build(SIZES[1], norm="none", shared=shared)
        assert layer.addressing.keys.keys.shape == (1 if shared else 8, 2, 9, 2)
        with torch.no_grad():
            for p in (layer.addressing.query.projection.weight, layer.addressing.query.projection.bias):
                p.copy_(p[:4].repeat(8, *[1] * (p.ndim - 1)))
        x_BTD = torch.randn(2, 5, 10, dtype=torch.float64)
        ids_BTHK = layer(x_BTD, context(x_BTD)._replace(observe=True)).trace["slot_ids"]
        assert bool((ids_BTHK == ids_BTHK[:, :, :1]).all()) is shared


def test_keys_per_head_cost_parameters_and_no_flops() -> None:
    one, several = (build(SIZES[0], shared=shared)[0].cost() for shared in (True, False))
    further_keys = (3 - 1) * 2 * 5 * 3
    assert several.params - one.params == several.active_params - one.active_params == further_keys
    assert (several.flops, several.lookup_bytes, several.table_params) == (
        one.flops,
        one.lookup_bytes,
        one.table_params,
    )


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_bf16_is_close_to_float64(norm: str) -> None:
    layer, tables = build(SIZES[0], norm=norm)
    for part in (layer, *tables):
        part.bfloat16()
    x_BTD = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    q_TH2P, _ = layer.addressing.query(x_BTD.flatten(0, 1))
    y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    assert y_BTD.dtype is torch.bfloat16
    x_TD, q_THP = x_BTD.flatten(0, 1).double(), q_TH2P.flatten(2).double()
    assert_close(y_BTD.flatten(0, 1), by_definition(layer, tables, x_TD, norm, "softmax", q_THP))


def test_initial_output_variance_is_that_of_the_experts() -> None:
    """Compares with E[sum w**2] E[gelu(a)**2] / D: y sums w gelu(a) v for a ~ N(0, 1), v of variance 1 / D."""
    tables = [ValueTable(rows=64**2, dim=64) for _ in range(2)]
    layer = PEER(
        dim=64, table=tables, n_keys=64, heads=8, knn=16, key_dim=16, query_norm="batch", router="softmax", glu=False
    )
    x_BTD = torch.randn(8, 64, 64)
    output = layer(x_BTD, context(x_BTD)._replace(observe=True))
    squares = output.trace["slot_weights"].square().sum((-1, -2)).mean() / 64
    gelu_square = torch.nn.functional.gelu(torch.randn(10**6)).square().mean()
    assert output.y_BTD.var().item() == pytest.approx((squares * gelu_square).item(), rel=0.1)


@pytest.mark.slow
def test_peak_memory_is_at_most_half_of_gather_and_einsum() -> None:
    """Runs the script that measures both at the published size, each in its own process."""
    script = ROOT / "scripts" / "bench_peer_memory.py"
    shown = subprocess.run(
        [sys.executable, str(script), "--rounds", "1"], check=True, capture_output=True, text=True
    ).stdout
    ratio = float(next(line for line in shown.splitlines() if line.startswith("| rows")).split("|")[-2])
    assert 0 < ratio < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "relu"}, r"ffn.router='relu' is not known; allowed: softmax, sigmoid\."),
        ({"query_norm": "bn"}, r"ffn.query_norm='bn' is not known; allowed: none, rms, batch, layer"),
        ({"knn": 26}, r"ffn.knn=26 is out of range; allowed: 1 to 25\."),
        ({"glu": True}, r"^PEER needs a list of 3 tables \(ffn.glu=True, "),
        ({"shared_keys": "no"}, r"ffn.shared_keys='no' is neither true nor false; set ffn.shared_keys=true"),
        ({"glu": "yes"}, r"ffn.glu='yes' is neither true nor false; set ffn.glu=true or ffn.glu=false\."),
        ({"n_keys": 6}, r"table has shape \(25, 7\), but ffn.glu=False, ffn.n_keys=6 and model.dim=7 need \(36, 7\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    tables = [ValueTable(rows=25, dim=7) for _ in range(2)]
    with pytest.raises(ConfigError, match=message):
        PEER(**{**SIZES[0], "table": tables, "query_norm": "batch", "router": "softmax", "glu": False, **changes})
