"""Reads of a table that is split over the members of a mesh: what travels before and after the local read.

`dim`: ids and weights of all members are gathered, each member sums its columns for all tokens, and the sums are
exchanged so that a token's rank gets all columns. That traffic does not depend on the number of rows read.
`row`: the same ids and weights; each member sums over its own rows, and the partial sums are added on their way.

In backward the same paths run the other way round; the local reads are then staged or differentiated as ever, for the
tokens of all members, so that the part's gradient is the sum over the members' tokens.

Letters: T own reads, A reads of all members, K rows a read, V values per row, C own columns, G groups a read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.ops.collectives import all_gather, columns_to_rows, reduce_scatter, rows_to_columns
from pkm_lightning.ops.segments import check_indices

if TYPE_CHECKING:
    from pkm_lightning.memory.mesh import TableMesh

#: The local read: ids, weights (0 where another member holds the row), ids to stage, groups.
LocalSum = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
#: The local inner products: x, ids, ids to stage.
LocalDot = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.compiler.disable
def sharded_sum(
    mesh: TableMesh, n_lines: int, read: LocalSum, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None
) -> Callable[[], Tensor]:
    """The weighted sums of `read` over the whole table, (T, V) or (T, G, V), when the result is called for.

    Args:
        mesh: with more than one member.
        n_lines: lines of the whole table, which ids count.
        read: sums this member's part for the given ids and weights, (A, K) -> (A, C) or (A, G, C).
        ids_TK, weights_TK, groups_TK: of the own reads.
    """
    check_indices("ValueTable", "ids", ids_TK, n_lines)
    lengths, group = mesh.lengths(len(ids_TK)), mesh.member_group(weights_TK.device)
    ids_AK = all_gather(ids_TK.int(), lengths, group)
    weights_AK = all_gather(weights_TK, lengths, group)
    groups_AK = None if groups_TK is None else all_gather(groups_TK.int(), lengths, group)
    if mesh.shard == "dim":
        return columns_to_rows(read(ids_AK, weights_AK, ids_AK, groups_AK), lengths, group)
    local_AK, own_AK, staged_AK = _own_rows(mesh, n_lines, ids_AK)
    partial = read(local_AK, torch.where(own_AK, weights_AK, 0), staged_AK, groups_AK)
    summed = reduce_scatter(partial, lengths, group)
    return lambda: summed


@torch.compiler.disable
def sharded_dot(mesh: TableMesh, n_lines: int, dot: LocalDot, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """The inner products of `dot` with whole lines, (T, K); arguments as in `sharded_sum`."""
    check_indices("ValueTable", "ids", ids_TK, n_lines)
    lengths, group = mesh.lengths(len(ids_TK)), mesh.member_group(x_TV.device)
    ids_AK = all_gather(ids_TK.int(), lengths, group)
    if mesh.shard == "dim":
        partial = dot(rows_to_columns(x_TV, lengths, group), ids_AK, ids_AK)
    else:
        local_AK, own_AK, staged_AK = _own_rows(mesh, n_lines, ids_AK)
        partial = torch.where(own_AK, dot(all_gather(x_TV, lengths, group), local_AK, staged_AK), 0)
    return reduce_scatter(partial, lengths, group)


def _own_rows(mesh: TableMesh, n_lines: int, ids_AK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids among the own lines (0 for others), which are own, and ids to stage (one past the last line for others)."""
    low, high = mesh.row_range(n_lines)
    own_AK = (ids_AK >= low) & (ids_AK < high)
    shifted_AK = ids_AK - low
    return torch.where(own_AK, shifted_AK, 0), own_AK, torch.where(own_AK, shifted_AK, high - low)
