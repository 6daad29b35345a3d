"""Lines with deltas: the same bits for the same deltas in any order, and the original ones without any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.edited_lines import EditedLines, with_deltas

NAMES = "abcd"
LINES, WIDTH = 12, 3


def drawn(dtype: torch.dtype) -> tuple[ValueTable, dict[str, tuple[Tensor, Tensor]]]:
    """Returns a table, and deltas of overlapping lines whose sum depends on the order of addition."""
    torch.manual_seed(3)
    table = ValueTable(rows=LINES, dim=WIDTH, learning="rows").to(dtype)
    table.weight.data[0] = float("nan")
    table.weight.data[1] = -0.0
    deltas = {}
    for number, name in enumerate(NAMES):
        lines_U = torch.randperm(LINES)[:7].sort().values
        deltas[name] = (lines_U, torch.randn(7, WIDTH) * 10.0 ** (2 * number - 3))
    return table, deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(toggles=st.lists(st.sampled_from(NAMES), max_size=12))
def test_any_sequence_of_changes_leaves_the_bits_of_the_set_that_remains(
    dtype: torch.dtype, toggles: list[str]
) -> None:
    table, deltas = drawn(dtype)
    base_NV, edited, present = table.weight.detach().clone(), EditedLines(table), set[str]()
    for name in toggles:
        if name in present:
            edited.remove(name)
        else:
            edited.apply(name, *deltas[name])
        present ^= {name}
        # Written out by hand: all deltas of a line in the order of their names, in a wider type, rounded once.
        expected_NV = base_NV.clone()
        for line in range(LINES):
            sum_V, has_any = base_NV[line].to(torch.promote_types(dtype, torch.float32)), False
            for other in sorted(present):
                lines_U, deltas_UV = deltas[other]
                if line in lines_U.tolist():
                    sum_V, has_any = sum_V + deltas_UV[lines_U.tolist().index(line)], True
            expected_NV[line] = sum_V.to(dtype) if has_any else base_NV[line]
        assert torch.equal(table.weight.detach().view(torch.uint8), expected_NV.view(torch.uint8))
    for name in present:
        edited.remove(name)
    assert torch.equal(table.weight.detach().view(torch.uint8), base_NV.view(torch.uint8))


def test_the_order_of_addition_is_that_of_the_names() -> None:
    base_UV, lines_U = torch.zeros(1, 1), torch.tensor([5])
    deltas = {name: (lines_U, torch.tensor([[value]])) for name, value in (("a", 1e8), ("b", -1e8), ("c", 1.0))}
    assert with_deltas(base_UV, lines_U, deltas).item() == 1.0
    assert with_deltas(base_UV, lines_U, dict(reversed(deltas.items()))).item() == 1.0
    assert with_deltas(base_UV, lines_U, {"a": deltas["a"], "b": deltas["c"], "c": deltas["b"]}).item() == 0.0


def test_shared_lines_are_counted_by_name() -> None:
    table, deltas = drawn(torch.float32)
    edited = EditedLines(table)
    edited.apply("a", *deltas["a"])
    both = set(deltas["a"][0].tolist()) & set(deltas["b"][0].tolist())
    assert edited.shared(deltas["b"][0]) == {"a": len(both)}
    assert edited.shared(torch.tensor([], dtype=torch.int64)) == {}
