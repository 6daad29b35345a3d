"""A plugin that CONTRIBUTING alone describes: one Python file, one YAML, one test; HashedMemory against its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ffn.plugin_contract import Case, PluginContract
from tolerances import assert_close, assert_same_gradients
from torch import Tensor

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.sizing import solve_size
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, HashedMemory
from pkm_lightning.memory import ValueTable

CASE = Case("hashed_memory", config_dir=Path(__file__).parent / "configs")


@pytest.mark.parametrize("case", [CASE], ids=str)
class TestHashedMemory(PluginContract):
    pass


def by_definition(layer: HashedMemory, values_NV: Tensor, x_TD: Tensor) -> Tensor:
    """Reads one token and one bit at a time."""
    rows = []
    for x_D in x_TD:
        bucket = sum(2**z for z, p_D in enumerate(layer.projection) if float(p_D @ x_D.detach()) > 0)
        rows.append(values_NV[bucket % len(values_NV)] / (1 + torch.exp(-(layer.gate.weight[0] @ x_D))))
    return torch.stack(rows)


@pytest.mark.parametrize(("dim", "n_slots", "bits"), [(7, 8, 3), (4, 1, 1), (5, 11, 30)])
def test_output_and_gradients_equal_the_formula(dim: int, n_slots: int, bits: int) -> None:
    table = ValueTable(rows=n_slots, dim=dim).double()
    layer = HashedMemory(dim=dim, table=table, n_slots=n_slots, bits=bits).double()
    assert bool((layer.projection.abs() == 1).all())
    x_BTD = torch.randn(2, 5, dim, dtype=torch.float64, requires_grad=True)
    y_BTD = layer(x_BTD, FFNContext(torch.zeros(2, 5, dtype=torch.int64))).y_BTD
    expected_BTD = by_definition(layer, table.weight, x_BTD.flatten(0, 1)).view_as(x_BTD)
    assert_close(y_BTD, expected_BTD)
    inputs = {"x": x_BTD, "table": table.weight, "gate": layer.gate.weight}
    assert_same_gradients(y_BTD, expected_BTD, inputs)


def test_the_knob_of_its_yaml_is_solved() -> None:
    settings = CASE.settings()
    solved = solve_size(settings | {"match": "params", "match_budget": 30_000})
    total = sum(p.numel() for p in build_meta_model(solved).parameters())
    assert abs(total - 30_000) <= 14 / 2


def test_refuses() -> None:
    table = ValueTable(rows=8, dim=7)
    with pytest.raises(ConfigError, match=r"ffn.bits=31 is out of range; allowed: 1 to 30\."):
        HashedMemory(dim=7, table=table, n_slots=8, bits=31)
    with pytest.raises(ConfigError, match=r"ffn.n_slots=8 is out of range; allowed: 1 to 4\."):
        HashedMemory(dim=7, table=table, n_slots=8, bits=2)
    with pytest.raises(ConfigError, match=r"table has shape \(8, 7\), but ffn.n_slots=9 and model.dim=7 need \(9, 7\)"):
        HashedMemory(dim=7, table=table, n_slots=9, bits=4)
