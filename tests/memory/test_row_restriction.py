"""A table whose learning is restricted to some rows: an update as if a step had read them alone; the others stay.

Letters: N rows, V values per row, T reads, K rows per read.
"""

from __future__ import annotations

from typing import Any

import pytest
import table_jobs as jobs
import torch
from rank_group import Groups
from torch import Tensor

from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable, clip_tables, restrict_rows

N, V, T, K = 23, 8, 12, 3
LEARN = [1, 4, 9, 16]


def table_of(dtype: torch.dtype, slices: int = 1) -> ValueTable:
    torch.manual_seed(3)
    return ValueTable(rows=N, dim=V, learning="rows", slices=slices).to(dtype)


def optimizer_of(table: ValueTable, rule: str, decay: float = 0.0) -> TableOptimizer:
    rows = RowOptimizer(rule=rule, betas=(0.0, 0.95))
    return TableOptimizer(None, {"table": table}, rows=rows, lr=0.1, weight_decay=decay)


def micro_batches(step: int, table: ValueTable) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    dtype, width = table.weight.dtype, table.dim // table.slices
    return [
        (
            torch.randint(table.n_lines, (T, K), generator=generator),
            torch.rand(T, K, generator=generator).to(dtype),
            torch.randn(T, width, generator=generator).to(dtype),
        )
        for _ in range(2)
    ]


def state_of(table: ValueTable, optimizer: TableOptimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state[table.weight].items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "decay"),
    [("sgd", 0.1), ("row_adagrad", 0.0), ("lazy_adam", 0.1), ("catch_up_adam", 0.0), ("factored_adam", 0.0)],
)
def test_only_chosen_rows_learn_as_if_they_alone_were_read(rule: str, decay: float, dtype: torch.dtype) -> None:
    """Norm, clipping, decay, stochastic rounding and states are bit-equal to those of a step without other reads."""
    restricted, alone = table_of(dtype), table_of(dtype)
    optimizers = [optimizer_of(table, rule, decay) for table in (restricted, alone)]
    before = restricted.weight.detach().clone()
    restrict_rows(restricted, torch.tensor(LEARN))
    for step in range(3):
        for ids_TK, weights_TK, grad_TV in micro_batches(step, restricted):
            (restricted(ids_TK, weights_TK) * grad_TV).sum().backward()
            keep_TK = torch.isin(ids_TK, torch.tensor(LEARN))
            sources_TK = torch.arange(T).unsqueeze(-1).expand(T, K)
            assert alone.stage is not None
            alone.stage.add(ids_TK[keep_TK], weights_TK[keep_TK], sources_TK[keep_TK], grad_TV)
        norms = [clip_tables([table], [], 0.5) for table in (restricted, alone)]
        assert torch.equal(*norms)
        assert norms[0] > 0.5
        for optimizer in optimizers:
            # The table that is filled by hand is never read.
            optimizer._steps_unread = 0
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(restricted.weight, alone.weight)
    states = [state_of(table, optimizer) for table, optimizer in zip((restricted, alone), optimizers, strict=True)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    others = sorted(set(range(N)) - set(LEARN))
    assert torch.equal(restricted.weight[others], before[others])
    assert not torch.equal(restricted.weight[LEARN], before[LEARN])
    assert all(not value[others].any() for name, value in states[0].items() if not name.startswith("column_"))


def test_slices_of_a_chosen_row_learn_and_another_choice_replaces_the_first() -> None:
    table = table_of(torch.float32, slices=2)
    optimizer = optimizer_of(table, "sgd")
    for choice in ([0, 5], [7], None):
        before = table.weight.detach().clone()
        restrict_rows(table, None if choice is None else torch.tensor(choice))
        ids_TK = torch.arange(2 * N).unsqueeze(0)
        table(ids_TK, torch.ones(1, 2 * N)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed_N = (table.weight != before).view(N, V).all(-1)
        assert changed_N.nonzero().flatten().tolist() == (list(range(N)) if choice is None else choice)


def test_a_choice_after_the_norm_was_taken_counts() -> None:
    table = table_of(torch.float32)
    assert table.stage is not None
    table(torch.tensor([[2, 3]]), torch.ones(1, 2)).sum().backward()
    both = table.stage.norm(table.weight)
    restrict_rows(table, torch.tensor([3]))
    torch.testing.assert_close(table.stage.norm(table.weight), both / 2**0.5)
    restrict_rows(table, torch.tensor([5]))
    assert table.stage.norm(table.weight) == 0


def test_refused() -> None:
    with pytest.raises(ValueError, match="does not learn by rows"):
        restrict_rows(ValueTable(rows=4, dim=2), torch.tensor([0]))
    with pytest.raises(ValueError, match="rows has 4; allowed: 0 to 3"):
        restrict_rows(ValueTable(rows=4, dim=2, learning="rows"), torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("shard", "members", "kind", "rule", "chosen"),
    [
        ("dim", 2, "sum", "row_adagrad", [3, 7, 20]),
        ("row", 2, "dot", "lazy_adam", [3, 7, 20]),
        ("none", 1, "groups", "sgd", [3, 7, 20]),
        # All chosen rows lie on the first rank, and both must take part in the sums over columns.
        ("row", 2, "sum", "factored_adam", [3, 7]),
        ("row", 2, "rows", "factored_adam", [3, 7]),
    ],
)
def test_a_sharded_table_learns_the_chosen_rows_as_a_whole_one(
    ranks: Groups, shard: str, members: int, kind: str, rule: str, chosen: list[int]
) -> None:
    ranks(2).run(jobs.compare, shard, members, "rows", kind, [13, 27], rule, 1, chosen)


def test_slices_of_a_sharded_table(ranks: Groups) -> None:
    ranks(2).run(jobs.compare, "row", 2, "rows", "sum", [13, 27], "lazy_adam", 2, [3, 7, 20])
