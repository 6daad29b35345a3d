"""Recorded reads add up to the gradient of the lines, for every way of reading a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.delta_reads import deltas_added
from pkm_lightning.memory.read_recorder import ReadRecorder

IDS_TK = torch.tensor([[0, 3, 3], [8, 3, 0], [5, 5, 1], [2, 2, 2]])
GROUPS_TK = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1]])


def summed(table: ValueTable, weights_TK: Tensor, x_TV: Tensor) -> Tensor:
    return table(IDS_TK, weights_TK).sin()


def grouped(table: ValueTable, weights_TK: Tensor, x_TV: Tensor) -> Tensor:
    return table(IDS_TK, weights_TK, GROUPS_TK, 2).sin()


def dotted(table: ValueTable, weights_TK: Tensor, x_TV: Tensor) -> Tensor:
    return table.dot(x_TV, IDS_TK).sin()


def gathered(table: ValueTable, weights_TK: Tensor, x_TV: Tensor) -> Tensor:
    return (table.gather(IDS_TK) * weights_TK.unsqueeze(2)).sin()


@pytest.mark.parametrize("read", [summed, grouped, dotted, gathered])
def test_the_units_add_up_to_the_gradient_of_the_lines(read: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    table = ValueTable(rows=9, dim=4, learning="dense")
    weights_TK, x_TV = torch.randn(4, 3), torch.randn(4, 4)
    # The last token does not matter, so that it leaves no unit.
    matters_T = torch.tensor([1.0, 1.0, 1.0, 0.0])

    def loss() -> Tensor:
        y = read(table, weights_TK, x_TV)
        return (y.flatten(1).sum(1) * matters_T).sum()

    (expected_NV,) = torch.autograd.grad(loss(), table.weight)
    recorder, total_NV = ReadRecorder(), torch.zeros(9, 4)
    with deltas_added({table: recorder}):
        loss().backward()  # type: ignore[no-untyped-call]
        (units,) = recorder.take()
        assert recorder.take() == []
    contributions_XKV = units.weights_XK.unsqueeze(2) * units.gradients_XV.unsqueeze(1)
    total_NV.index_add_(0, units.ids_XK.flatten(), contributions_XKV.flatten(0, 1))
    torch.testing.assert_close(total_NV, expected_NV)
    assert 2 not in units.ids_XK
    assert table.weight.grad is None
