"""The gradient of a table's part, averaged over its replicas by the scheme that exchanges the fewest bytes.

Each replica has staged the reads of its own tokens. Three schemes of exchange give the same sum:

| scheme | bytes that a rank receives from R - 1 others |
|---|---|
| `reads` | (R - 1) (L (4 + 4 + c) + X V b): ids, sources, coefficients, and source rows, which many reads share |
| `rows` | (R - 1) U (4 + V b): one gradient per row that was read |
| `dense` | 2 (R - 1) / R N (V + 1) c: an all-reduce of the whole part and of a flag per row that was read |

The numbers are the maxima over the replicas, so that all choose the same scheme; of equal ones the first is taken.

Letters: L staged reads, X source rows, U rows that were read, R replicas, b and c bytes of a value of the table and
of a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.ops.collectives import all_gather
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.ops.row_gradients import row_gradients
from pkm_lightning.ops.row_update import RowGradient, row_gradient

if TYPE_CHECKING:
    from pkm_lightning.memory.mesh import TableMesh


class StagedReads(NamedTuple):
    """The staged reads of a step; see `RowStage.add`."""

    ids_L: Tensor
    coefficients_L: Tensor
    sources_L: Tensor
    source_rows_XV: Tensor


def mean_gradient(n_rows: int, staged: StagedReads, mesh: TableMesh | None, *, reads: int) -> RowGradient | None:
    """Returns the gradient of all ranks' reads, averaged over ranks as in data parallelism; None if no rank has read.

    A rank whose rows nobody has read has an empty gradient, since the update of a table is collective.

    Collective: call on all ranks. With several replicas the host synchronises, to exchange the numbers of reads.

    Args:
        n_rows: rows of this rank's part.
        staged: the reads of this rank, or of all members of its group where the table is sharded.
        mesh: None: every rank of the default process group, if there is one, holds a copy.
        reads: number of reads of the whole table, by this rank or all members of its group, of which `staged` are
            those of rows that this rank holds and that learn.
    """
    world = dist.get_world_size() if is_distributed() else 1
    replicas = world if mesh is None else mesh.replicas
    if replicas == 1:
        if not reads:
            return None
        mean = staged if world == 1 else staged._replace(coefficients_L=staged.coefficients_L / world)
        return row_gradient(n_rows, *mean)
    group = dist.group.WORLD if mesh is None else mesh.replica_group(staged.ids_L.device)
    assert group is not None
    # Sorted before the exchange: the number of rows decides the scheme, and `rows` and `dense` need the sums.
    local = row_gradient(n_rows, *staged)
    numbers = torch.tensor([reads, len(staged.ids_L), len(staged.source_rows_XV), len(local.segments.rows_U)])
    numbers_R4 = all_gather(numbers.to(staged.ids_L.device).unsqueeze(0), [1] * replicas, group).cpu()
    total, lengths, sources, rows = numbers_R4.T.tolist()
    if not max(total):
        return None
    if not max(lengths):
        return local
    scheme = cheapest_scheme(max(lengths), max(sources), max(rows), n_rows, staged.source_rows_XV, replicas)
    if scheme == "reads":
        merged = _gather_reads(staged, lengths, sources, group)
    elif scheme == "rows":
        merged = _gather_rows(local, rows, n_rows, group)
    else:
        merged = _sum_densely(local, n_rows, group)
    return row_gradient(n_rows, *merged._replace(coefficients_L=merged.coefficients_L / world))


def cheapest_scheme(reads: int, sources: int, rows: int, n_rows: int, source_rows_XV: Tensor, replicas: int) -> str:
    """Returns `reads`, `rows` or `dense`, by the table above."""
    dim, item = source_rows_XV.shape[1], source_rows_XV.element_size()
    received = received_bytes(reads, sources, rows, n_rows=n_rows, dim=dim, item=item, replicas=replicas)
    return min(received, key=received.__getitem__)


def received_bytes(
    reads: int, sources: int, rows: int, *, n_rows: int, dim: int, item: int, replicas: int
) -> dict[str, int]:
    """Returns the bytes that a rank receives with each scheme, in the order of preference.

    Args:
        reads, sources, rows: maxima over the replicas of staged reads, source rows and rows that were read.
        n_rows, dim: shape of the part.
        item: bytes of a value of the table.
        replicas: number of replicas.
    """
    sum_bytes = max(item, 4)  # sums are fp32 or wider
    return {
        "reads": (replicas - 1) * (reads * (8 + sum_bytes) + sources * dim * item),
        "rows": (replicas - 1) * rows * (4 + dim * item),
        "dense": 2 * (replicas - 1) * n_rows * (dim + 1) * sum_bytes // replicas,
    }


def _gather_reads(staged: StagedReads, reads: list[int], sources: list[int], group: dist.ProcessGroup) -> StagedReads:
    ids_L, sources_L = (all_gather(part, reads, group) for part in (staged.ids_L, staged.sources_L))
    # The source rows of a replica follow those of the replicas before it.
    first_R = torch.tensor([0, *sources[:-1]], device=ids_L.device).cumsum(0)
    shift_L = first_R.repeat_interleave(torch.tensor(reads, device=ids_L.device), output_size=sum(reads))
    coefficients_L = all_gather(staged.coefficients_L, reads, group)
    return StagedReads(
        ids_L, coefficients_L, sources_L + shift_L.int(), all_gather(staged.source_rows_XV, sources, group)
    )


def _gather_rows(local: RowGradient, rows: list[int], n_rows: int, group: dist.ProcessGroup) -> StagedReads:
    grads_UV = _row_sums(local)
    ids_U = local.segments.rows_U.int()
    ids_U = torch.where(ids_U < 0, n_rows, ids_U)  # padding counts as a row of another rank
    ids_L = all_gather(ids_U, rows, group)
    return _one_source_each(ids_L, all_gather(grads_UV.to(local.source_rows_XV.dtype), rows, group))


def _sum_densely(local: RowGradient, n_rows: int, group: dist.ProcessGroup) -> StagedReads:
    grads_UV = _row_sums(local)
    rows_U = local.segments.rows_U.long()
    # One row more for padding, and one column more to mark the rows that were read.
    table_NV = grads_UV.new_zeros(n_rows + 1, grads_UV.shape[1] + 1)
    at_U = torch.where(rows_U < 0, n_rows, rows_U)
    table_NV[at_U, :-1] = grads_UV
    table_NV[at_U, -1] = 1
    dist.all_reduce(table_NV[:-1], group=group)
    touched_U = table_NV[:-1, -1].nonzero().squeeze(-1)
    return _one_source_each(touched_U.int(), table_NV[touched_U, :-1].to(local.source_rows_XV.dtype))


def _row_sums(local: RowGradient) -> Tensor:
    return row_gradients(local.segments, local.coefficients_L, local.sources_L, local.source_rows_XV)


def _one_source_each(ids_L: Tensor, rows_LV: Tensor) -> StagedReads:
    """Returns staged reads of gradients of rows: each read has a source row of its own and the coefficient 1."""
    sum_dtype = torch.promote_types(rows_LV.dtype, torch.float32)
    one_L = torch.ones(len(ids_L), dtype=sum_dtype, device=ids_L.device)
    return StagedReads(ids_L, one_L, torch.arange(len(ids_L), dtype=torch.int32, device=ids_L.device), rows_LV)


def norm_over_members(norm: Tensor, mesh: TableMesh | None) -> Tensor:
    """Returns the norm of the whole table, given the norm of this rank's part. Collective: call on all ranks."""
    if mesh is None or mesh.members == 1:
        return norm
    squared = norm.detach().square()
    dist.all_reduce(squared, group=mesh.member_group(norm.device))
    return squared.sqrt()


def mean_over_replicas(grad: Tensor, mesh: TableMesh | None) -> None:
    """Averages autograd's gradient of a part over all ranks, in place. Collective: call on all ranks.

    On entry it is the sum over the tokens of this group's members.
    """
    if mesh is None:
        return
    if mesh.replicas > 1:
        dist.all_reduce(grad, group=mesh.replica_group(grad.device))
    grad.div_(mesh.world)
