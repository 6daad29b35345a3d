"""Refusals of table meshes, and the part of each member; what needs ranks stands in `tests/strategies`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable
from pkm_lightning.memory.mesh import TableMesh, check_dim, check_members, check_rows, group_size
from pkm_lightning.memory.replicas import cheapest_scheme


def part_of(shard: str, members: int, member: int) -> TableMesh:
    """Builds the mesh of one of several members, without the others."""
    mesh = TableMesh.__new__(TableMesh)
    mesh.shard, mesh.members, mesh.member, mesh.replicas, mesh.world = shard, members, member, 1, members
    return mesh


def test_a_group_is_all_ranks_a_node_or_a_number() -> None:
    assert [group_size(group, 16, 8) for group in ("world", "node", 4)] == [16, 8, 4]
    for wrong in ("rack", 0, -1, True, 1.5, None):
        with pytest.raises(ConfigError, match="allowed: world, node, or a number of ranks"):
            group_size(wrong, 16, 8)  # type: ignore[arg-type]


def test_indivisible_groups_and_columns_are_refused_with_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"table.group=3 does not divide the 4 ranks; allowed: 1, 2, 4"):
        check_members("dim", 3, 4)
    with pytest.raises(ConfigError, match=r"10 values of a row over 4 ranks; set table.shard=row, or table.group=2"):
        check_dim("dim", 10, 4)
    check_dim("row", 10, 4)
    with pytest.raises(
        ConfigError, match=r"some of 4 ranks without any of 9 rows; set table.shard=dim, or table.group=2"
    ):
        check_rows("row", 9, 4)
    check_rows("row", 10, 4)


@pytest.mark.parametrize(("rows", "members"), [(10, 4), (16, 4), (3, 2)])
@pytest.mark.parametrize("shard", ["row", "dim"])
def test_the_parts_make_up_the_table_that_one_process_draws(rows: int, members: int, shard: str) -> None:
    torch.manual_seed(1)
    whole = ValueTable(rows=rows, dim=8)
    parts = []
    for member in range(members):
        torch.manual_seed(1)
        parts.append(ValueTable(rows=rows, dim=8, mesh=part_of(shard, members, member)).weight)
    assert torch.equal(torch.cat(parts, 0 if shard == "row" else 1), whole.weight)
    assert sum(part.numel() for part in parts) == whole.size


def test_a_large_table_is_drawn_in_blocks_as_in_one_go() -> None:
    torch.manual_seed(1)
    table = ValueTable(rows=70_001, dim=129, std=1.0)
    torch.manual_seed(1)
    assert torch.equal(table.weight, torch.randn(70_001, 129))


def test_replicas_exchange_what_needs_the_fewest_bytes() -> None:
    rows_XD = torch.empty(0, 128)
    assert cheapest_scheme(1_000, 10, 900, 10**6, rows_XD, 8) == "reads"
    assert cheapest_scheme(10**6, 10**5, 1_000, 10**6, rows_XD, 8) == "rows"
    assert cheapest_scheme(10**6, 10**5, 10_000, 10_000, rows_XD, 8) == "dense"


def test_parts_of_a_table_are_rounded_by_other_bits_and_replicas_by_the_same() -> None:
    table, other = ValueTable(rows=4, dim=2, learning="rows"), ValueTable(rows=4, dim=2, learning="rows")

    def seed(member: int, *, shard: str = "dim", step: int = 1, run: int = 0, of: ValueTable = table) -> int:
        of.mesh = SimpleNamespace(member=member, shard=shard)  # type: ignore[assignment]
        rows = RowOptimizer(rule="sgd")
        optimizer = TableOptimizer(None, {"first": table, "second": other}, rows=rows, lr=0.1, seed=run)
        return optimizer._rounding_seed(of, step)

    assert seed(1) == seed(1)
    assert len({seed(0), seed(1), seed(0, step=2), seed(0, run=1), seed(0, of=other)}) == 5
    assert seed(0, shard="none") == seed(1, shard="none")
