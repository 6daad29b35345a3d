"""Reads as zeros: what a model computes then is what it computes with zeros in its tables, which stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ffn.plugin_contract import Case, built, ids, run
from rank_group import Groups
from torch import Tensor

from pkm_lightning.memory import TableMesh, ValueTable, zero_reads

CASES = [
    Case("memory"),
    Case("memory_plus"),
    Case("memory_plus", {"gate": "none", "value_projection": True, "value_dim": 9}, "map"),
    Case("pkm"),
    Case("peer"),
    Case("peer", {"glu": True}, "glu"),
    Case("ultramem", {"value_dim": 6}),
    Case("ultramem_v2", {"value_dim": 5}),
    Case("ple", {"value_dim": 5}),
    Case("stem"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_without_reads_is_one_with_empty_tables(case: Case) -> None:
    model = copy.deepcopy(built(case)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    empty = copy.deepcopy(model)
    for table in empty.value_tables:
        torch.nn.init.zeros_(table.weight)
    with torch.no_grad():
        whole = run(model, ids()).hidden_BTD
        with zero_reads(model.value_tables):
            read = run(model, ids()).hidden_BTD
        again = run(model, ids()).hidden_BTD
        expected = run(empty, ids()).hidden_BTD
    assert torch.equal(read, expected)
    assert torch.equal(again, whole)
    assert not torch.allclose(read, whole)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_that_are_not_finite_are_not_read() -> None:
    table = ValueTable(rows=5, dim=3)
    torch.nn.init.constant_(table.weight, torch.nan)
    with zero_reads([table]):
        assert table(torch.tensor([[1, 2]]), torch.ones(1, 2)).tolist() == [[0.0, 0.0, 0.0]]
        assert table.dot(torch.ones(1, 3), torch.tensor([[4]])).tolist() == [[0.0]]


def test_an_error_ends_it_and_an_inner_block_does_not_end_the_outer_one() -> None:
    table, other = ValueTable(rows=5, dim=3), ValueTable(rows=5, dim=3)
    with zero_reads([table]):
        with pytest.raises(KeyError), zero_reads([table, other]):
            {}["missing"]
        assert (table.reads_zeros, other.reads_zeros) == (True, False)
    assert not table.reads_zeros


def sharded_reads(shard: str, enters: int) -> dict[str, Any]:
    """Reads a sharded table twice; only the rank `enters` reads zeros the first time, or all ranks if it is -1."""
    torch.manual_seed(0)
    mesh = TableMesh(shard=shard, members=2, device_type="cpu")
    table = ValueTable(rows=6, dim=4, mesh=mesh)
    ids_TK, weights_TK = torch.tensor([[0, 5], [3, 1]]), torch.ones(2, 2)

    def read() -> list[Tensor]:
        return [table(ids_TK, weights_TK), table.dot(torch.ones(2, 4), ids_TK), table.gather(ids_TK)]

    with torch.no_grad():
        silent = [table] if enters in (-1, torch.distributed.get_rank()) else []
        with zero_reads(silent):
            first = read()
        return {"first": [bool(part.any()) for part in first], "second": [bool(part.any()) for part in read()]}


@pytest.mark.parametrize("shard", ["dim", "row"])
@pytest.mark.parametrize("enters", [-1, 1])
def test_ranks_that_share_a_table_go_on_exchanging_reads(ranks: Groups, shard: str, enters: int) -> None:
    results = ranks(2).run(sharded_reads, shard, enters)
    for rank, result in enumerate(results):
        reads = enters not in (-1, rank)
        assert result == {"first": [reads] * 3, "second": [True] * 3}
