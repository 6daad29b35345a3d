"""The value table: one registered parameter, read by ids and weights, referred to without being registered again."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import assert_close
from torch import nn

from pkm_lightning.memory import TableReference, ValueTable, take_over_tables


class Holder(nn.Module):
    def __init__(self, table: ValueTable) -> None:
        super().__init__()
        self.reference = TableReference(table)


def test_reads_weighted_rows() -> None:
    table = ValueTable(rows=6, dim=3)
    ids_TK = torch.tensor([[5, 0], [2, 2]], dtype=torch.int32)
    y_TV = table(ids_TK, torch.tensor([[0.25, 0.75], [0.5, 1.0]]))
    rows_NV = table.weight.detach()
    assert_close(y_TV, torch.stack([0.25 * rows_NV[5] + 0.75 * rows_NV[0], 1.5 * rows_NV[2]]))


def test_rows_start_with_variance_one_over_dim() -> None:
    table = ValueTable(rows=400, dim=64)
    assert table.weight.mean().item() == pytest.approx(0, abs=0.005)
    assert table.weight.std().item() == pytest.approx(1 / 8, rel=0.03)


def test_is_a_parameter_with_the_role_of_a_table() -> None:
    table = ValueTable(rows=6, dim=3)
    assert [name for name, _ in table.named_parameters()] == ["weight"]
    assert table.parameter_roles == {"weight": "table"}
    assert repr(table) == "ValueTable(rows=6, dim=3, learning=dense)"


def test_a_reference_registers_the_table_until_a_model_takes_it_over() -> None:
    table, other = ValueTable(rows=6, dim=3), ValueTable(rows=6, dim=3)
    model = nn.ModuleList([Holder(table), Holder(table), Holder(other)])
    names = [f"{holder}.reference.table.weight" for holder in range(3)]
    assert list(model.state_dict()) == names
    model.double()
    assert table.weight.dtype is torch.float64
    take_over_tables(model, [table])
    assert list(model.state_dict()) == names[2:]
    assert model[0].reference.table is table  # type: ignore[union-attr]
    assert len(list(model.parameters())) == 1
    take_over_tables(model, [table])


@pytest.mark.parametrize("released", [True, False])
def test_copies_of_holders_share_one_copy(released: bool) -> None:
    table = ValueTable(rows=6, dim=3)
    holders = [Holder(table), Holder(table)]
    if released:
        take_over_tables(nn.ModuleList(holders), [table])
    copied_table, first, second = copy.deepcopy([table, *holders])
    assert first.reference.table is second.reference.table is copied_table
    assert copied_table is not table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gather_returns_each_line_by_itself(dtype: torch.dtype) -> None:
    table = ValueTable(rows=7, dim=6, slices=2).to(dtype)
    ids_TK = torch.tensor([[13, 0, 5], [5, 5, 1]])
    lines_TKV = table.gather(ids_TK)
    assert torch.equal(lines_TKV, table.weight.detach()[ids_TK])
    lines_TKV.sum().backward()
    assert table.weight.grad is not None
    assert torch.equal(table.weight.grad[:, 0], torch.bincount(ids_TK.flatten(), minlength=14).to(dtype))
