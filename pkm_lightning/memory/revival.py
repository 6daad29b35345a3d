"""New values for rows that nobody reads, new sub-keys for those that no query chooses.

Letters: N rows, D values a row, M rows or sub-keys to be written, L lines (M * slices), T queries, S sub-keys,
E dimension of a half key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from pkm_lightning.memory.mesh import whole

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from pkm_lightning.memory.value_table import ValueTable


@torch.no_grad()
def copy_rows(
    table: ValueTable, rows_M: Int64[Tensor, " M"], sources_M: Int64[Tensor, " M"], *, noise: float, seed: int
) -> None:
    """Row rows[m] becomes row sources[m] plus normal noise of `noise` times the RMS of the line that it is copied from.

    Every rank must call it with the same arguments; each writes what it holds, and copies of a table stay the same.
    The noise is drawn for the whole table: it does not depend on how that is split.
    """
    mesh, width = table.mesh, table.dim // table.slices
    shard = "none" if mesh is None else mesh.shard
    low, high = (0, table.n_lines) if mesh is None else mesh.row_range(table.n_lines)
    columns = slice(0, width) if mesh is None else mesh.columns(width)
    lines_L, from_L = (_lines(which_M, table).to(table.weight.device) for which_M in (rows_M, sources_M))
    wide = torch.promote_types(table.weight.dtype, torch.float32)
    values_LD = torch.zeros(len(from_L), table.weight.shape[1], dtype=wide, device=table.weight.device)
    is_here_L = (from_L >= low) & (from_L < high)
    values_LD[is_here_L] = table.weight[from_L[is_here_L] - low].to(wide)
    if mesh is not None and shard == "row":
        dist.all_reduce(values_LD, group=mesh.member_group(values_LD.device))
    squares_L = values_LD.square().sum(1)
    if mesh is not None and shard == "dim":
        dist.all_reduce(squares_L, group=mesh.member_group(squares_L.device))
    # On the host, whose generator draws the same everywhere.
    drawn_LD = torch.randn(len(from_L), width, generator=torch.Generator().manual_seed(seed))[:, columns]
    values_LD += noise * (squares_L / width).sqrt()[:, None] * drawn_LD.to(values_LD)
    is_mine_L = (lines_L >= low) & (lines_L < high)
    table.weight[lines_L[is_mine_L] - low] = values_LD[is_mine_L].to(table.weight.dtype)


@torch.no_grad()
def forget_rows(state: Mapping[str, Any], table: ValueTable, rows_M: Int64[Tensor, " M"]) -> None:
    """Zeros in an optimizer's `state` of `table.weight` what belongs to these rows: moments, sums, last updates."""
    low, high = (0, table.n_lines) if table.mesh is None else table.mesh.row_range(table.n_lines)
    lines_L = _lines(rows_M, table)
    for value in state.values():
        if isinstance(value, Tensor) and value.ndim and len(value) == len(table.weight):
            own_L = lines_L.to(value.device)
            value[own_L[(own_L >= low) & (own_L < high)] - low] = 0


def _lines(rows_M: Tensor, table: ValueTable) -> Tensor:
    return (rows_M[:, None] * table.slices + torch.arange(table.slices, device=rows_M.device)).flatten()


@torch.no_grad()
def keys_for_worst_served(
    q_TE: Float[Tensor, "T E"],
    keys_SE: Float[Tensor, "S E"],
    dead_M: Int64[Tensor, " M"],
    *,
    normalised: bool,
    noise: float,
    seed: int,
) -> Float[Tensor, "M E"]:
    """A new sub-key for each of `dead`, near the queries that all others serve worst.

    How well a query is served is its best score over its own length. The first new sub-key points where the worst
    served query does, the next where the then worst served one does, and so on: no two go to one place. They are as
    long as the others are on average, and get normal noise of `noise` times the RMS of their numbers.

    Args:
        q_TE: queries; with a normalisation of the keys times its gains.
        keys_SE: all sub-keys of the half, before any normalisation.
        dead_M: those to be replaced.
        normalised: only the direction of a sub-key counts.
        noise, seed: of what is added.
    """
    length = keys_SE.norm(dim=1).mean()
    directions_TE = functional.normalize(q_TE.to(keys_SE.dtype), dim=1)
    is_alive_S = torch.ones(len(keys_SE), dtype=torch.bool, device=keys_SE.device)
    is_alive_S[dead_M] = False
    alive_SE = functional.normalize(keys_SE[is_alive_S], dim=1) if normalised else keys_SE[is_alive_S]
    served_T = directions_TE.new_full((len(directions_TE),), -torch.inf)
    if len(alive_SE):
        served_T = (directions_TE @ alive_SE.T).amax(1)
    made = []
    for _ in range(len(dead_M)):
        direction_E = directions_TE[served_T.argmin()]
        served_T = torch.maximum(served_T, directions_TE @ (direction_E if normalised else direction_E * length))
        made.append(direction_E * length)
    made_ME = torch.stack(made)
    drawn_ME = torch.randn(made_ME.shape, generator=torch.Generator().manual_seed(seed)).to(made_ME)
    return made_ME + noise * length * keys_SE.shape[1] ** -0.5 * drawn_ME


@torch.no_grad()
def write_keys(parameter: Tensor, head: int, half: int, dead_M: Int64[Tensor, " M"], value_ME: Tensor | float) -> None:
    """parameter[head, half, dead] = value, of a tensor (heads, 2, S, E) that may be split over ranks as a DTensor."""
    full = whole(parameter.detach()).clone() if isinstance(parameter, DTensor) else parameter.detach()
    full[head, half, dead_M] = value_ME.to(full.dtype) if isinstance(value_ME, Tensor) else value_ME
    if isinstance(parameter, DTensor):
        parameter.detach().copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
