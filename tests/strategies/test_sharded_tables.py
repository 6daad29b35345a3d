"""A table on a mesh gives what the whole table gives: reads, gradients, norms and updates, in float64."""

from __future__ import annotations

import pytest
import table_jobs as jobs
import torch
from rank_group import Groups

from pkm_lightning.ops.segments import _padded_segments


@pytest.mark.parametrize(
    ("size", "shard", "members", "learning", "kind", "sizes", "rule"),
    [
        (2, "dim", 2, "rows", "sum", [20, 20], "lazy_adam"),
        (2, "dim", 2, "rows", "dot", [33, 7], "row_adagrad"),
        (2, "row", 2, "rows", "groups", [20, 20], "catch_up_adam"),
        (2, "row", 2, "rows", "dot", [1, 39], "lazy_adam"),
        (2, "row", 2, "dense", "dot", [20, 20], ""),
        (2, "dim", 2, "dense", "groups", [39, 1], ""),
        (2, "dim", 2, "rows", "rows", [33, 7], "lazy_adam"),
        (2, "row", 2, "rows", "rows", [1, 39], "lazy_adam"),
        (2, "row", 2, "dense", "rows", [20, 20], ""),
        (2, "none", 1, "rows", "rows", [11, 29], "sgd"),
        (2, "dim", 2, "rows", "dot", [33, 7], "factored_adam"),
        (2, "row", 2, "rows", "groups", [20, 20], "factored_adam"),
        (2, "none", 1, "rows", "sum", [11, 29], "factored_adam"),
        (2, "none", 1, "rows", "sum", [11, 29], "sgd"),
        (2, "none", 1, "dense", "dot", [11, 29], ""),
        (2, "none", 1, "rows", "sum", [40, 0], "sgd"),
        pytest.param(*(4, "dim", 4, "rows", "groups", [10, 10, 10, 10], "row_adagrad"), marks=pytest.mark.slow),
        pytest.param(*(4, "dim", 2, "rows", "dot", [3, 17, 9, 11], "lazy_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 4, "rows", "rows", [10, 0, 29, 1], "lazy_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "dim", 2, "dense", "rows", [3, 17, 9, 11], ""), marks=pytest.mark.slow),
        pytest.param(*(4, "dim", 2, "rows", "dot", [3, 17, 9, 11], "factored_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "dim", 4, "rows", "sum", [10, 0, 29, 1], "factored_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 2, "rows", "sum", [10, 10, 10, 10], "factored_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 4, "rows", "dot", [10, 0, 29, 1], "factored_adam"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 4, "rows", "sum", [10, 0, 29, 1], "row_adagrad"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 2, "rows", "dot", [10, 10, 10, 10], "sgd"), marks=pytest.mark.slow),
        pytest.param(*(4, "row", 2, "dense", "sum", [10, 10, 10, 10], ""), marks=pytest.mark.slow),
    ],
)
def test_reads_gradients_norm_and_update_are_those_of_the_whole_table(
    ranks: Groups, size: int, shard: str, members: int, learning: str, kind: str, sizes: list[int], rule: str
) -> None:
    ranks(size).run(jobs.compare, shard, members, learning, kind, sizes, rule)


@pytest.mark.parametrize("kind", ["rows", "sum"])
def test_a_rank_whose_rows_nobody_reads_takes_part_in_the_update(ranks: Groups, kind: str) -> None:
    assert ranks(2).run(jobs.read_one_part, kind, timeout=30.0) == [1, 1]


def test_slices_are_split_each_for_itself(ranks: Groups) -> None:
    ranks(2).run(jobs.compare, "dim", 2, "rows", "groups", [13, 27], "row_adagrad", 2)


@pytest.mark.parametrize("scheme", ["reads", "rows", "dense"])
def test_every_scheme_of_exchange_between_replicas_gives_the_same(ranks: Groups, scheme: str) -> None:
    ranks(2).run(jobs.scheme_of_replicas, scheme)


def test_all_gather_of_different_lengths_and_its_gradient(ranks: Groups) -> None:
    first, second = ranks(2).run(jobs.gathered, [3, 1])
    assert first[:, 0].tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert second[:, 0].tolist() == [0, 0, 0, 1, 3]


def test_on_an_accelerator_reads_of_other_ranks_rows_belong_to_no_segment() -> None:
    ids_L = torch.tensor([2, 4, 0, 2, 4, 4], dtype=torch.int32)
    sorted_L, order_L = torch.sort(ids_L, stable=True)
    for n_rows, rows in ((4, [0, 2, -1, -1]), (3, [0, 2, -1])):
        segments = _padded_segments(sorted_L.clamp(max=n_rows), order_L, n_rows)
        assert segments.rows_U.tolist() == rows
        starts = segments.starts_Z.tolist()
        assert starts[:3] == [0, 1, 3]
        assert set(starts[3:]) == {3}
