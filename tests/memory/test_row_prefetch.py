"""Rows that are fetched ahead: recognised by their ids, refreshed after updates, and dropped with their thread.

Letters: N rows, V values per row, T tokens, K rows per token.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from stored_files import stored
from torch import Tensor

from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable
from pkm_lightning.memory.row_prefetch import RowPrefetcher

N, V, T, K = 50, 4, 6, 2
CPU = torch.device("cpu")


def ids() -> Tensor:
    return torch.randint(0, N, (T, K))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("table-")]


@pytest.fixture
def learning() -> tuple[ValueTable, TableOptimizer]:
    """A table in memory that learns by rows, and its optimizer."""
    table = ValueTable(rows=N, dim=V, learning="rows")
    return table, TableOptimizer(None, {"table": table}, rows=RowOptimizer(rule="sgd"), lr=0.5)


def test_a_read_is_recognised_by_its_ids_and_others_are_made_anew(tmp_path: Path) -> None:
    table = ValueTable(rows=N, dim=V, device="mmap", stored=stored(tmp_path / "rows", torch.randn(N, V)))
    plain = ValueTable(rows=N, dim=V, stored=table.stored)
    first_TK, second_TK, other_TK = ids(), ids(), ids()
    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], lambda: [(table, first_TK), (table, second_TK)])
    for wanted_TK in (second_TK, first_TK.int(), other_TK, first_TK):
        assert torch.equal(table.gather(wanted_TK), plain.gather(wanted_TK))
    assert prefetcher.find(table, first_TK.int()) is not None
    assert prefetcher.find(table, first_TK[:, :1]) is None
    assert prefetcher.find(table, other_TK) is None
    assert prefetcher.find(plain, first_TK) is None
    for _ in range(2):  # two micro-batches are kept
        prefetcher.submit("train", [table], lambda: [(table, second_TK)])
    assert prefetcher.find(table, first_TK) is None
    assert len(threads()) == 1
    prefetcher.end("train")
    assert threads() == []
    assert table.prefetcher is None


def test_rows_that_were_updated_since_are_read_again(learning: tuple[ValueTable, TableOptimizer]) -> None:
    table, optimizer = learning
    coming_TK = ids()
    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], lambda: [(table, coming_TK)])
    found = prefetcher.find(table, coming_TK)
    assert found is not None
    before = found.rows_UV
    for _ in range(2):
        table(coming_TK[:2], torch.ones(2, K)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = prefetcher.find(table, coming_TK)
    assert found is not None
    assert torch.equal(found.rows_UV, table.weight[found.lines_U])
    assert not torch.equal(found.rows_UV, before)
    with torch.no_grad():
        table.weight[3] = 1.0  # by nobody who says which rows
    assert prefetcher.find(table, coming_TK) is None
    prefetcher.end("train")


def test_gather_of_fetched_rows_is_staged(learning: tuple[ValueTable, TableOptimizer]) -> None:
    table, optimizer = learning
    wanted_TK, upstream_TKV = ids(), torch.randn(T, K, V)
    rows = []
    for prefetches in (False, True):
        prefetcher = RowPrefetcher(CPU)
        if prefetches:
            prefetcher.submit("train", [table], lambda: [(table, wanted_TK)])
        (table.gather(wanted_TK) * upstream_TKV).sum().backward()
        assert table.stage is not None
        gradient = table.stage.gradient(table.weight)
        assert gradient is not None
        dense_NV = torch.zeros(N, V).index_add(0, wanted_TK.flatten(), upstream_TKV.flatten(0, 1))
        before = table.weight.clone()
        optimizer.step()
        optimizer.zero_grad()
        rows.append((before - table.weight) / 0.5)
        assert torch.allclose(rows[-1], dense_NV, atol=1e-5)
        prefetcher.end("train")


def test_an_error_of_the_thread_reaches_the_reader_or_the_next_batch(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    table = ValueTable(rows=N, dim=V, device="mmap", stored=stored(path, torch.randn(N, V)))

    def failing() -> list[tuple[ValueTable, Tensor]]:
        raise KeyError("no such row")

    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], failing)
    with pytest.raises(KeyError, match="no such row"):
        table.gather(ids())
    prefetcher.submit("train", [table], list)
    with pytest.raises(KeyError, match="no such row"):
        prefetcher.submit("train", [table], list)
    prefetcher.end("train")
    assert threads() == []
