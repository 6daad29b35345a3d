"""Reads with deltas on top: those of a table that holds the sums; only the deltas learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.delta_reads import deltas_added
from pkm_lightning.memory.row_deltas import RowDeltas

IDS = torch.tensor([[0, 3, 3], [7, 2, 9]])
WEIGHTS = torch.tensor([[0.5, 0.25, -1.0], [1.0, 2.0, 0.5]])
GROUPS = torch.tensor([[0, 1, 1], [1, 0, 1]])
READS: dict[str, Callable[[ValueTable], Tensor]] = {
    "sum": lambda table: table(IDS, WEIGHTS),
    "groups": lambda table: table(IDS, WEIGHTS, GROUPS, 2),
    "dot": lambda table: table.dot(torch.arange(8.0).view(2, 4), IDS),
    "gather": lambda table: table.gather(IDS),
}


def with_random_deltas(learning: str) -> tuple[ValueTable, RowDeltas]:
    table = ValueTable(rows=10, dim=4, learning=learning)
    deltas = RowDeltas(torch.tensor([2, 3, 8]), 4)
    deltas.values_UV.data.normal_()
    return table, deltas


@pytest.mark.parametrize("learning", ["rows", "dense"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_that_of_the_sums_and_its_gradient_is_that_of_the_lines(
    read: Callable[[ValueTable], Tensor], learning: str
) -> None:
    table, deltas = with_random_deltas(learning)
    summed = ValueTable(rows=10, dim=4)
    summed.weight.data = table.weight.detach().index_add(0, deltas.lines_U, deltas.values_UV.detach())
    expected = read(summed)
    with deltas_added({table: deltas}):
        y = read(table)
        torch.testing.assert_close(y, expected)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    (expected * torch.arange(y.numel()).view_as(y)).sum().backward()
    assert summed.weight.grad is not None
    torch.testing.assert_close(deltas.values_UV.grad, summed.weight.grad[deltas.lines_U])
    assert table.weight.grad is None
    assert table.deltas is None
    assert table.learns
    if table.stage is not None:
        assert table.stage.gradient(table.weight) is None


def test_without_lines_and_after_an_error_the_table_reads_as_before() -> None:
    table, _ = with_random_deltas("rows")
    before = table(IDS, WEIGHTS)
    with deltas_added({table: RowDeltas(torch.tensor([], dtype=torch.int64), 4)}):
        assert torch.equal(table(IDS, WEIGHTS), before)
    _, deltas = with_random_deltas("rows")
    with pytest.raises(KeyboardInterrupt), deltas_added({table: deltas}):
        raise KeyboardInterrupt
    assert torch.equal(table(IDS, WEIGHTS), before)
    assert table.stage is not None
