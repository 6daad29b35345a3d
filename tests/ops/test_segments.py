"""Segments hold every read once, sorted by row; on accelerators they are the same with a padded end.

Letters: L reads, U segments, Z limits of segments.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pkm_lightning.ops import segments as module
from pkm_lightning.ops.numba_segments import sorted_segments
from pkm_lightning.ops.segments import Segments, read_segments, read_sources


def padded(ids_L: Tensor, n_rows: int) -> Segments:
    sorted_L, order_L = torch.sort(ids_L.int(), stable=True)
    return module._padded_segments(sorted_L, order_L, n_rows)


@pytest.mark.parametrize("build", [read_segments, padded])
@pytest.mark.parametrize("n_rows", [1, 5, 200])
def test_every_read_is_once_in_the_segment_of_its_row(n_rows: int, build) -> None:
    ids_L = torch.randint(n_rows, (77,))
    order_L, rows_U, starts_Z = build(ids_L, n_rows)
    assert rows_U.dtype is torch.int32
    assert rows_U[rows_U >= 0].tolist() == sorted(set(ids_L.tolist()))
    assert starts_Z[-1] == 77
    for row, start, stop in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        assert order_L[start:stop].tolist() == [read for read, i in enumerate(ids_L.tolist()) if i == row]


def test_the_length_of_padded_segments_does_not_depend_on_the_ids() -> None:
    segments = padded(torch.tensor([3, 3, 1]), 100)
    assert segments.rows_U.tolist() == [1, 3, -1]
    assert segments.starts_Z.tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize("ids", [[4, 1, 4, 0], [4, 4], [0, 1, 2, 3, 4, 4, 2], [3, 2, 1, 0]])
def test_marked_reads_belong_to_no_padded_segment(ids: list[int]) -> None:
    order_L, rows_U, starts_Z = padded(torch.tensor(ids), 4)
    assert len(rows_U) == min(len(ids), 4)
    for row, start, stop in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        assert order_L[start:stop].tolist() == [read for read, i in enumerate(ids) if i == row]
    assert rows_U[rows_U >= 0].tolist() == sorted(set(ids) - {4})


@pytest.mark.parametrize("build", [read_segments, padded])
def test_no_reads_make_no_segments(build) -> None:
    assert [part.tolist() for part in build(torch.zeros(0, dtype=torch.int64), 9)] == [[], [], [0]]


def test_sources_are_tokens_or_their_groups() -> None:
    ids_TK, groups_TK = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 0, 3], [0, 0, 2]])
    assert read_sources(ids_TK).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert read_sources(ids_TK, groups_TK, 4).tolist() == [[1, 0, 3], [4, 4, 6]]


@pytest.mark.parametrize(
    ("reads", "n_rows"),
    [(1, 1), (3, 2), (300, 7), (5000, 1024), (5000, 1025), (20_000, 2**20), (20_000, 2**21), (500, 2**31 - 1)],
)
def test_the_radix_sort_is_the_stable_sort_of_torch(reads: int, n_rows: int) -> None:
    pytest.importorskip("numba")
    ids_L = torch.randint(n_rows, (reads,), dtype=torch.int32)
    ids_L[:2], ids_L[-1] = n_rows - 1, 0
    order_L, rows_U, starts_Z = sorted_segments(ids_L)
    sorted_L, expected_L = torch.sort(ids_L, stable=True)
    assert torch.equal(order_L, expected_L)
    expected_U, counts_U = torch.unique_consecutive(sorted_L, return_counts=True)
    assert torch.equal(rows_U, expected_U)
    assert torch.equal(starts_Z, torch.nn.functional.pad(counts_U.cumsum(0), (1, 0)))


@pytest.mark.parametrize("n_rows", [2**10, 2**20, 2**30])
def test_an_id_behind_the_last_row_is_sorted_by_all_its_bits(n_rows: int) -> None:
    ids_L = torch.tensor([n_rows, 0, n_rows - 1, n_rows, 0, 1])
    order_L, rows_U, starts_Z = read_segments(ids_L, n_rows)
    assert order_L.tolist() == [1, 4, 5, 2, 0, 3]
    assert rows_U.tolist() == [0, 1, n_rows - 1, n_rows]
    assert starts_Z.tolist() == [0, 2, 3, 4, 6]


def test_few_and_many_reads_take_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ids_L = torch.randint(40, (99,))
    by_radix = read_segments(ids_L, 40)
    monkeypatch.setattr(module, "_MANY_READS", 0)
    assert all(
        torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(by_radix, read_segments(ids_L, 40), strict=True)
    )
