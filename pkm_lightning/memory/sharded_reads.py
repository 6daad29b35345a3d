"""Reads of a table that is sharded over the members of a mesh: the collectives before and after the local read.

`dim`: ids and weights of all members are gathered, each member sums its columns for all tokens, and an all-to-all
returns all columns to the rank of the token. The traffic of the sums does not depend on the number of rows read.
`row`: ids and weights are gathered as well; each member sums over its own rows, and a reduce-scatter adds the partial
sums.

Backward runs the transposed collectives. The local reads are staged or differentiated as usual, for the tokens of all
members, so that the gradient of a part is the sum over the members' tokens.

Letters: T tokens, or reads where a plugin reads several times per token, of this rank, A those of all members, K lines
per read, C columns of this rank, G groups per read.
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
#: The local rows: ids, ids to stage.
LocalRows = Callable[[Tensor, Tensor], Tensor]


# Collectives whose sizes the hosts have just exchanged cannot be traced.
@torch.compiler.disable
def sharded_sum(
    mesh: TableMesh, n_lines: int, read: LocalSum, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None
) -> Callable[[], Tensor]:
    """Starts the read and returns a function that returns the weighted sums over the whole table, (T, V) or (T, G, V).

    Collective: call on all members.

    Args:
        mesh: a mesh of more than one member.
        n_lines: lines of the whole table.
        read: sums over this member's part, (A, K) -> (A, C) or (A, G, C).
        ids_TK, weights_TK, groups_TK: the reads of this rank.
    """
    check_indices("ValueTable", "ids", ids_TK, n_lines)
    lengths, group = mesh.lengths(len(ids_TK)), mesh.member_group(weights_TK.device)
    ids_AK = all_gather(ids_TK.int(), lengths, group)
    weights_AK = all_gather(weights_TK, lengths, group)
    groups_AK = None if groups_TK is None else all_gather(groups_TK.int(), lengths, group)
    if mesh.shard == "dim":
        return columns_to_rows(read(ids_AK, weights_AK, ids_AK, groups_AK), lengths, group)
    local_AK, is_local_AK, staged_AK = _local_rows(mesh, n_lines, ids_AK)
    partial = read(local_AK, torch.where(is_local_AK, weights_AK, 0), staged_AK, groups_AK)
    # A reduce-scatter is complete when it returns, so there is nothing to overlap as with `dim`.
    summed = reduce_scatter(partial, lengths, group)
    return lambda: summed


@torch.compiler.disable
def sharded_dot(mesh: TableMesh, n_lines: int, dot: LocalDot, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes the inner products with whole lines, (T, K). Collective; arguments as in `sharded_sum`."""
    check_indices("ValueTable", "ids", ids_TK, n_lines)
    lengths, group = mesh.lengths(len(ids_TK)), mesh.member_group(x_TV.device)
    ids_AK = all_gather(ids_TK.int(), lengths, group)
    if mesh.shard == "dim":
        partial = dot(rows_to_columns(x_TV, lengths, group), ids_AK, ids_AK)
    else:
        local_AK, is_local_AK, staged_AK = _local_rows(mesh, n_lines, ids_AK)
        partial = torch.where(is_local_AK, dot(all_gather(x_TV, lengths, group), local_AK, staged_AK), 0)
    return reduce_scatter(partial, lengths, group)


@torch.compiler.disable
def sharded_rows(mesh: TableMesh, n_lines: int, read: LocalRows, ids_TK: Tensor) -> Tensor:
    """Returns whole lines one by one, (T, K, V). Collective; arguments as in `sharded_sum`, without weights."""
    check_indices("ValueTable", "ids", ids_TK, n_lines)
    lengths, group = mesh.lengths(len(ids_TK)), mesh.member_group(ids_TK.device)
    ids_AK = all_gather(ids_TK.int(), lengths, group)
    if mesh.shard == "dim":
        return columns_to_rows(read(ids_AK, ids_AK), lengths, group)()
    local_AK, is_local_AK, staged_AK = _local_rows(mesh, n_lines, ids_AK)
    # Every line lies on one member: the sum adds zeros to it.
    partial = torch.where(is_local_AK.unsqueeze(-1), read(local_AK, staged_AK), 0)
    return reduce_scatter(partial, lengths, group)


def _local_rows(mesh: TableMesh, n_lines: int, ids_AK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids within this member's lines (0 for others), whether they are local, and ids to stage.

    The id to stage is one past the end for lines of other members.
    """
    low, high = mesh.row_range(n_lines)
    is_local_AK = (ids_AK >= low) & (ids_AK < high)
    shifted_AK = ids_AK - low
    return torch.where(is_local_AK, shifted_AK, 0), is_local_AK, torch.where(is_local_AK, shifted_AK, high - low)
