"""PKM against a brute-force definition that scores every slot: outputs, every gradient, padding, batch statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import brute_force
from tolerances import assert_close, assert_same_gradients
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import PKM, FFNContext
from pkm_lightning.memory import ValueTable

SIZES: list[dict[str, Any]] = [
    {"dim": 7, "n_keys": 5, "heads": 3, "knn": 8, "key_dim": 6},
    {"dim": 10, "n_keys": 9, "heads": 8, "knn": 4, "key_dim": 4},
    {"dim": 4, "n_keys": 6, "heads": 1, "knn": 2, "key_dim": 2},
]
NORMS = ["batch", "layer", "none"]


def build(sizes: dict[str, Any], *, norm: str, dtype: torch.dtype = torch.float64, **options: Any) -> PKM:
    table = ValueTable(rows=sizes["n_keys"] ** 2, dim=sizes["dim"])
    layer = PKM(**sizes, table=table, query_norm=norm, **options)
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    table.to(dtype)
    return layer.to(dtype)


def by_brute_force(layer: PKM, norm: str, x_TD: Tensor, q_THP: Tensor | None = None) -> Tensor:
    p = brute_force.parameters(layer)
    heads, knn = layer.addressing.query.heads, layer.addressing.knn
    chosen = brute_force.read(p, x_TD, heads=heads, knn=knn, norm=norm, q_THP=q_THP)
    y_TD = brute_force.weighted_values(chosen, layer.values.table.weight.double())
    return y_TD @ p["values.projection.weight"].T if "values.projection.weight" in p else y_TD


def context(x_BTD: Tensor, valid_BT: Tensor | None = None) -> FFNContext:
    return FFNContext(torch.zeros(x_BTD.shape[:2], dtype=torch.int64), valid_BT)


@pytest.mark.parametrize("options", [{}, {"cures": {"simvq": True}}])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_brute_force(sizes: dict[str, Any], norm: str, options: dict[str, Any]) -> None:
    layer = build(sizes, norm=norm, **options)
    x_BTD = torch.randn(2, 5, sizes["dim"], dtype=torch.float64, requires_grad=True)
    y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    expected_BTD = by_brute_force(layer, norm, x_BTD.flatten(0, 1)).view_as(x_BTD)
    assert_close(y_BTD, expected_BTD)
    inputs = {"x": x_BTD, "table": layer.values.table.weight, **dict(layer.named_parameters())}
    assert_same_gradients(y_BTD, expected_BTD, inputs)


@pytest.mark.parametrize("norm", NORMS)
def test_padding_never_enters_the_statistics(norm: str) -> None:
    layer = build(SIZES[0], norm=norm)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.float64)
    valid_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    output = layer(x_BTD, context(x_BTD, valid_BT))
    assert_close(output.y_BTD[valid_BT], by_brute_force(layer, norm, x_BTD[valid_BT]))
    layer.after_step(output.step_stats)
    if norm == "batch":
        expected_F = layer.addressing.query.projection(x_BTD[valid_BT]).mean(0) * 0.1
        assert_close(layer.addressing.query.norm.running_mean, expected_F.detach())


@pytest.mark.parametrize("norm", ["layer", "none", "batch"])
def test_one_token_at_evaluation(norm: str) -> None:
    layer = build(SIZES[0], norm=norm).eval()
    x_BTD = torch.randn(2, 4, 7, dtype=torch.float64)
    together_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    alone_BTD = layer(x_BTD[1:, 2:3], context(x_BTD[1:, 2:3])).y_BTD
    assert_close(alone_BTD[0, 0], together_BTD[1, 2])


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_scores_in_fp32_and_is_close_to_float64(norm: str) -> None:
    layer = build(SIZES[0], norm=norm, dtype=torch.bfloat16)
    x_BTD = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    q_TH2P, _ = layer.addressing.query(x_BTD.flatten(0, 1))
    y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
    assert y_BTD.dtype is torch.bfloat16
    expected_TD = by_brute_force(layer, norm, x_BTD.flatten(0, 1).double(), q_TH2P.flatten(2).double())
    assert_close(y_BTD.flatten(0, 1), expected_TD)


def test_initialisation() -> None:
    layer = PKM(dim=64, table=ValueTable(rows=400, dim=64), n_keys=20, heads=2, knn=2, key_dim=8, query_norm="batch")
    assert layer.values.table.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    keys = layer.addressing.keys.keys
    assert keys.abs().max() <= 4**-0.5
    assert keys.std().item() == pytest.approx(4**-0.5 / 3**0.5, rel=0.05)


def test_initial_output_variance_is_that_of_the_weights_times_the_values() -> None:
    """Compares with E[sum w**2] / D, since y sums H * K values of variance 1 / D with weights w."""
    table = ValueTable(rows=64**2, dim=64)
    layer = PKM(dim=64, table=table, n_keys=64, heads=4, knn=8, key_dim=16, query_norm="batch")
    x_BTD = torch.randn(8, 64, 64)
    output = layer(x_BTD, context(x_BTD)._replace(observe=True))
    expected = output.trace["slot_weights"].square().sum((-1, -2)).mean() / 64
    assert output.y_BTD.var().item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_norm": "rms"}, r"ffn.query_norm='rms' is not known; allowed: batch, layer, none\."),
        ({"key_dim": 5}, r"ffn.key_dim=5 is odd"),
        ({"key_dim": "x"}, r"ffn.key_dim='x' is not a number"),
        ({"knn": 26}, r"ffn.knn=26 is out of range; allowed: 1 to 25\."),
        ({"n_keys": 6}, r"table has shape \(25, 7\), but ffn.n_keys=6 and model.dim=7 need \(36, 7\)"),
        ({"cures": {"gumble_noise": 1}}, r"ffn.cures.gumble_noise is not known; .* Did you mean 'gumbel_noise'\?"),
        ({"cures": {"balance_loss": -1}}, r"ffn.cures.balance_loss=-1 is out of range; allowed: 0 or more"),
        ({"cures": {"simvq": "maybe"}}, r"ffn.cures.simvq='maybe' is neither true nor false; set ffn.cures.simvq=true"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PKM(**{**SIZES[0], "table": ValueTable(rows=25, dim=7), "query_norm": "batch", **changes})
