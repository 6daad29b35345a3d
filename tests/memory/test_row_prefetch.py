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

from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable, row_prefetch
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
    prefetcher.submit("train", [table], lambda: {"layer": [(table, first_TK), (table, second_TK)]}, ())
    for wanted_TK in (second_TK, first_TK.int(), other_TK, first_TK):
        assert torch.equal(table.gather(wanted_TK), plain.gather(wanted_TK))
    assert prefetcher.find(table, first_TK.int()) is not None
    assert prefetcher.find(table, first_TK[:, :1]) is None
    assert prefetcher.find(table, other_TK) is None
    assert prefetcher.find(plain, first_TK) is None
    for _ in range(2):  # two micro-batches are kept
        prefetcher.submit("train", [table], lambda: {"layer": [(table, second_TK)]}, ())
    assert prefetcher.find(table, first_TK) is None
    assert len(threads()) == 1
    prefetcher.end("train")
    assert threads() == []
    assert table.prefetcher is None


def test_ids_of_tokens_that_were_moved_are_known_without_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ValueTable(rows=N, dim=V, device="mmap", stored=stored(tmp_path / "rows", torch.randn(N, V)))
    host_T, moved_T, ids_TK, other_TK = torch.arange(T), torch.arange(T), ids(), ids()
    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], lambda: {"layer": [(table, ids_TK)], "other": []}, (host_T, None))
    assert table.ids_ahead("layer", (moved_T, None)) is None  # not moved yet
    prefetcher.follow((host_T + 1, None), (moved_T, None))  # of another micro-batch
    assert table.ids_ahead("layer", (moved_T, None)) is None
    prefetcher.follow((host_T, None), (moved_T, None))
    for reader, tokens in (("other", (moved_T, None)), ("layer", (host_T, None)), ("layer", (moved_T, moved_T))):
        assert table.ids_ahead(reader, tokens) is None
    ahead = table.ids_ahead("layer", (moved_T, None))
    assert ahead is not None
    with monkeypatch.context() as patches:
        patches.setattr(row_prefetch, "_has_same_values", lambda *_: pytest.fail("ids were compared"))
        assert prefetcher.find(table, ahead[0].view(-1).view(T, K)) is not None
    # Written to: the values are now those of another read, and its rows are not here.
    ahead[0].copy_(other_TK)
    assert prefetcher.find(table, ahead[0]) is None
    assert prefetcher.find(table, other_TK.clone()) is None
    moved_T += 1
    assert table.ids_ahead("layer", (moved_T, None)) is None
    prefetcher.end("train")


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_read_does_not_wait_for_those_of_the_next_micro_batch(tmp_path: Path, is_ahead: bool) -> None:
    table = ValueTable(rows=N, dim=V, device="mmap", stored=stored(tmp_path / "rows", torch.randn(N, V)))
    tokens, wanted_TK, may_read = (torch.arange(T),), ids(), threading.Event()
    prefetcher = RowPrefetcher(CPU)

    def late() -> dict[object, list[tuple[ValueTable, Tensor]]]:
        may_read.wait(10)
        return {}

    prefetcher.submit("train", [table], lambda: {"layer": [(table, wanted_TK)]}, tokens)
    prefetcher.submit("train", [table], late, (torch.arange(T) + 1,))
    next_batch = prefetcher._batches["train"][1].reads
    prefetcher.follow(tokens, tokens)
    ahead = table.ids_ahead("layer", tokens)
    assert ahead is not None
    assert prefetcher.find(table, ahead[0] if is_ahead else wanted_TK.clone()) is not None
    assert not next_batch.done()
    may_read.set()
    prefetcher.end("train")


def test_rows_that_were_updated_since_are_read_again(learning: tuple[ValueTable, TableOptimizer]) -> None:
    table, optimizer = learning
    coming_TK = ids()
    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], lambda: {"layer": [(table, coming_TK)]}, ())
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
            prefetcher.submit("train", [table], lambda: {"layer": [(table, wanted_TK)]}, ())
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

    def failing() -> dict[object, list[tuple[ValueTable, Tensor]]]:
        raise KeyError("no such row")

    prefetcher = RowPrefetcher(CPU)
    prefetcher.submit("train", [table], failing, ())
    with pytest.raises(KeyError, match="no such row"):
        table.gather(ids())
    prefetcher.submit("train", [table], dict, ())
    with pytest.raises(KeyError, match="no such row"):
        prefetcher.submit("train", [table], dict, ())
    prefetcher.end("train")
    assert threads() == []
