"""New values for rows that are never read, and new sub-keys for those that no query selects.

Letters: M rows or sub-keys to be written, L lines (M * slices), T queries, P values of a half key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from pkm_lightning.ops.ranks import full_tensor
from pkm_lightning.ops.row_update import COLUMN_STATE

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from pkm_lightning.memory.value_table import ValueTable


@torch.no_grad()
def copy_rows(
    table: ValueTable, rows_M: Int64[Tensor, " M"], sources_M: Int64[Tensor, " M"], *, noise: float, seed: int
) -> None:
    """Copies row sources[m] to row rows[m], plus normal noise of `noise` times the RMS of the line that is copied.

    Collective: call on all ranks with the same arguments. Each rank writes its part, and copies of a table stay equal.
    The noise is drawn for whole lines and does not depend on the sharding.
    """
    mesh, width = table.mesh, table.dim // table.slices
    shard = "none" if mesh is None else mesh.shard
    low, high = (0, table.n_lines) if mesh is None else mesh.row_range(table.n_lines)
    columns = slice(0, width) if mesh is None else mesh.columns(width)
    lines_L, source_lines_L = (_lines(ids_M, table).to(table.weight.device) for ids_M in (rows_M, sources_M))
    sum_dtype = torch.promote_types(table.weight.dtype, torch.float32)
    values_LV = torch.zeros(len(source_lines_L), table.weight.shape[1], dtype=sum_dtype, device=table.weight.device)
    is_local_source_L = (source_lines_L >= low) & (source_lines_L < high)
    values_LV[is_local_source_L] = table.weight[source_lines_L[is_local_source_L] - low].to(sum_dtype)
    if mesh is not None and shard == "row":
        # One member holds each source row; the others add zeros.
        dist.all_reduce(values_LV, group=mesh.member_group(values_LV.device))
    squares_L = values_LV.square().sum(1)
    if mesh is not None and shard == "dim":
        dist.all_reduce(squares_L, group=mesh.member_group(squares_L.device))
    # The generator of the host draws the same numbers on every machine.
    noise_LV = torch.randn(len(source_lines_L), width, generator=torch.Generator().manual_seed(seed))[:, columns]
    values_LV += noise * (squares_L / width).sqrt()[:, None] * noise_LV.to(values_LV)
    is_local_L = (lines_L >= low) & (lines_L < high)
    table.weight[lines_L[is_local_L] - low] = values_LV[is_local_L].to(table.weight.dtype)


@torch.no_grad()
def forget_rows(state: Mapping[str, Any], table: ValueTable, rows_M: Int64[Tensor, " M"]) -> None:
    """Resets to zero the entries of these rows in an optimizer's `state` of `table.weight`."""
    low, high = (0, table.n_lines) if table.mesh is None else table.mesh.row_range(table.n_lines)
    lines_L = _lines(rows_M, table)
    for name, value in state.items():
        if name.startswith(COLUMN_STATE):
            continue
        if isinstance(value, Tensor) and value.ndim and len(value) == len(table.weight):
            lines_L = lines_L.to(value.device)
            value[lines_L[(lines_L >= low) & (lines_L < high)] - low] = 0


def _lines(rows_M: Tensor, table: ValueTable) -> Tensor:
    return (rows_M[:, None] * table.slices + torch.arange(table.slices, device=rows_M.device)).flatten()


@torch.no_grad()
def keys_for_worst_served(
    q_TP: Float[Tensor, "T P"],
    keys_SP: Float[Tensor, "S P"],
    dead_M: Int64[Tensor, " M"],
    *,
    normalised: bool,
    noise: float,
    seed: int,
) -> Float[Tensor, "M P"]:
    """Returns a new sub-key for each of `dead`, near the queries with the lowest best scores.

    The best score of a query is divided by its length. The first new sub-key has the direction of the query whose best
    score is lowest; that sub-key then counts for the best scores, the next has the direction of the query whose best
    score is lowest then, and so on, so that no two are equal. Their length is the mean length of the sub-keys, and they
    get normal noise of `noise` times the RMS of their values.

    Args:
        q_TP: queries, multiplied by the gains where the keys are normalised.
        keys_SP: all sub-keys of the half, before any normalisation.
        dead_M: the sub-keys to be replaced.
        normalised: whether the keys are normalised, so that only their direction counts.
        noise, seed: scale and seed of the noise.
    """
    length = keys_SP.norm(dim=1).mean()
    directions_TP = functional.normalize(q_TP.to(keys_SP.dtype), dim=1)
    is_alive_S = torch.ones(len(keys_SP), dtype=torch.bool, device=keys_SP.device)
    is_alive_S[dead_M] = False
    alive_SP = functional.normalize(keys_SP[is_alive_S], dim=1) if normalised else keys_SP[is_alive_S]
    best_T = directions_TP.new_full((len(directions_TP),), -torch.inf)
    if len(alive_SP):
        best_T = (directions_TP @ alive_SP.T).amax(1)
    directions = []
    for _ in range(len(dead_M)):
        direction_P = directions_TP[best_T.argmin()]
        best_T = torch.maximum(best_T, directions_TP @ (direction_P if normalised else direction_P * length))
        directions.append(direction_P * length)
    new_MP = torch.stack(directions)
    noise_MP = torch.randn(new_MP.shape, generator=torch.Generator().manual_seed(seed)).to(new_MP)
    return new_MP + noise * length * keys_SP.shape[1] ** -0.5 * noise_MP


@torch.no_grad()
def write_keys(parameter: Tensor, head: int, half: int, dead_M: Int64[Tensor, " M"], value_MP: Tensor | float) -> None:
    """Writes parameter[head, half, dead] = value to a tensor (heads, 2, S, P), which may be a DTensor.

    Collective for a DTensor: call on all ranks.
    """
    full = full_tensor(parameter.detach()).clone() if isinstance(parameter, DTensor) else parameter.detach()
    full[head, half, dead_M] = value_MP.to(full.dtype) if isinstance(value_MP, Tensor) else value_MP
    if isinstance(parameter, DTensor):
        parameter.detach().copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
