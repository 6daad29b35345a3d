"""The vanilla memory layer against a brute-force definition that scores every slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import brute_force
from tolerances import assert_close, assert_same_gradients

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, Memory
from pkm_lightning.memory import ValueTable

SIZES: list[dict[str, Any]] = [
    {"dim": 7, "n_keys": 5, "heads": 3, "knn": 8, "key_dim": 6},
    {"dim": 10, "n_keys": 9, "heads": 8, "knn": 4, "key_dim": 4},
    {"dim": 4, "n_keys": 6, "heads": 1, "knn": 2, "key_dim": 4},
]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_brute_force(sizes: dict[str, Any], shape: tuple[int, int], qk_norm: bool) -> None:
    table = ValueTable(rows=sizes["n_keys"] ** 2, dim=sizes["dim"]).double()
    layer = Memory(**sizes, table=table, qk_norm=qk_norm).double()
    x_BTD = torch.randn(*shape, sizes["dim"], dtype=torch.float64, requires_grad=True)
    y_BTD = layer(x_BTD, FFNContext(torch.zeros(shape, dtype=torch.int64))).y_BTD
    norm = "rms" if qk_norm else "none"
    p, x_TD = brute_force.parameters(layer), x_BTD.flatten(0, 1)
    chosen = brute_force.read(p, x_TD, heads=sizes["heads"], knn=sizes["knn"], norm=norm)
    expected_BTD = brute_force.weighted_values(chosen, table.weight).view_as(x_BTD)
    assert_close(y_BTD, expected_BTD)
    inputs = {"x": x_BTD, "table": table.weight, **dict(layer.named_parameters())}
    assert_same_gradients(y_BTD, expected_BTD, inputs)


def test_the_default_is_one_layer_with_nothing_after_the_read() -> None:
    layer = Memory(**SIZES[0], table=ValueTable(rows=25, dim=7), qk_norm=True)
    assert {name.split(".")[1] for name, _ in layer.addressing.named_parameters(prefix="a")} == {"query", "keys"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knn": 26}, r"ffn.knn=26 is out of range; allowed: 1 to 25\."),
        ({"key_dim": 3}, r"ffn.key_dim=3 is odd; it is split into two half keys: use 4\."),
        ({"dim": 8}, r"table has shape \(25, 7\), but ffn.n_keys=5 and model.dim=8 need \(25, 8\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Memory(**{**SIZES[0], "table": ValueTable(rows=25, dim=7), "qk_norm": True, **changes})
