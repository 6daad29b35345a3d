"""Jobs for a group of ranks: reads of one table on a mesh, and the same reads of the whole table.

Letters: T reads of all ranks, K rows per read, V values per row, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.memory import RowOptimizer, TableMesh, TableOptimizer, ValueTable, clip_tables, restrict_rows
from pkm_lightning.memory import replicas as replicas_module
from pkm_lightning.memory.replicas import mean_over_replicas
from pkm_lightning.ops.collectives import all_gather
from pkm_lightning.ops.row_update import COLUMN_STATE

ROWS, DIM, K = 29, 16, 5


def make(learning: str, mesh: TableMesh | None, slices: int = 1) -> ValueTable:
    torch.manual_seed(3)
    return ValueTable(rows=ROWS, dim=DIM, learning=learning, mesh=mesh, slices=slices).double()


def part(mesh: TableMesh, whole: Tensor) -> Tensor:
    """Returns the part of the whole table that a member holds."""
    low, high = mesh.row_range(len(whole))
    return whole[low:high, mesh.columns(whole.shape[1])]


def state_part(mesh: TableMesh, whole: ValueTable, name: str, state: Any) -> Any:
    """Returns the part of a state of the whole table that a member holds."""
    rows, columns = slice(*mesh.row_range(whole.n_lines)), mesh.columns(whole.weight.shape[1])
    if not isinstance(state, Tensor):
        return state
    return state[columns] if name.startswith(COLUMN_STATE) else state[(rows, columns)[: state.ndim]]


def loss(table: ValueTable, part: slice, kind: str) -> Tensor:
    """Runs forward and backward of the reads `part` of a fixed set; returns the gradients of the inputs."""
    torch.manual_seed(5)
    lines, width = table.n_lines, table.dim // table.slices
    tokens = 40
    ids_TK = torch.randint(lines, (tokens, K), dtype=torch.int64)
    ids_TK[:, 0] = 7  # a row that all ranks read
    weights_TK = torch.randn(tokens, K, dtype=torch.float64)
    x_TV, target = torch.randn(tokens, width, dtype=torch.float64), torch.randn(tokens, 2, width, dtype=torch.float64)
    groups_TK = torch.randint(2, (tokens, K))
    ids_TK, weights_TK, x_TV, target, groups_TK = (v[part] for v in (ids_TK, weights_TK, x_TV, target, groups_TK))
    weights_TK.requires_grad_(True)
    x_TV.requires_grad_(True)
    if kind == "sum":
        value = (table(ids_TK, weights_TK) * target[:, 0]).sum()
    elif kind == "groups":
        value = (table(ids_TK, weights_TK, groups_TK, 2) * target).sum()
    elif kind == "rows":
        value = (table.gather(ids_TK) * weights_TK.unsqueeze(-1) * target[:, :1]).sum()
    else:  # PEER's expert: a dot and a sum
        value = (table(ids_TK, weights_TK * table.dot(x_TV, ids_TK).tanh()) * target[:, 0]).sum()
    value.backward()
    assert weights_TK.grad is not None
    return torch.cat([weights_TK.grad, torch.zeros_like(x_TV) if x_TV.grad is None else x_TV.grad], 1)


def compare(
    shard: str,
    members: int,
    learning: str,
    kind: str,
    sizes: list[int],
    rule: str,
    slices: int = 1,
    chosen: list[int] | None = None,
) -> None:
    """Compares gradients of the inputs, the norm, and the table after a clipped update with those of one process.

    With `chosen`, only these rows learn.
    """
    mesh = TableMesh(shard=shard, members=members, device_type="cpu")
    world, rank = dist.get_world_size(), dist.get_rank()
    start = sum(sizes[:rank])
    local, whole = make(learning, mesh, slices), make(learning, None, slices)
    whole.stage = None if whole.stage is None else type(whole.stage)(whole.n_lines, alone())
    assert torch.equal(local.weight, part(mesh, whole.weight))
    inputs = loss(local, slice(start, start + sizes[rank]), kind)
    expected = loss(whole, slice(0, sum(sizes)), kind)[start : start + sizes[rank]]
    torch.testing.assert_close(inputs, expected)
    norms, states = [], []
    for table in (local, whole):
        if chosen is not None:
            restrict_rows(table, torch.tensor(chosen))
        if table.weight.grad is not None:
            if table is local:
                mean_over_replicas(local.weight.grad, mesh)
            else:
                whole.weight.grad.div_(world)
        norms.append(clip_tables([table], [], 0.01))
        if learning == "dense":
            with torch.no_grad():
                table.weight -= 0.1 * table.weight.grad
            continue
        optimizer = TableOptimizer(None, {"t": table}, rows=RowOptimizer(rule=rule, betas=(0.0, 0.95)), lr=0.1)
        for _ in range(2):  # the second time with states of the first
            optimizer.step()
        states.append(optimizer.state[table.weight])
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(local.weight.detach(), part(mesh, whole.weight.detach()))
    for name, expected in states[1].items() if states else ():
        torch.testing.assert_close(states[0][name], state_part(mesh, whole, name, expected))
    changed_N = (whole.weight != make(learning, None, slices).weight).any(-1).view(ROWS, slices).any(-1)
    assert changed_N.any()
    assert chosen is None or set(changed_N.nonzero().flatten().tolist()) <= set(chosen)


def read_one_part(kind: str) -> int:
    """Returns the updates that this rank's part has had, after a step that read rows of the first rank only."""
    mesh = TableMesh(shard="row", members=2, device_type="cpu")
    table = make("rows", mesh)
    optimizer = TableOptimizer(None, {"t": table}, rows=RowOptimizer(rule="factored_adam", betas=(0.0, 0.95)), lr=0.1)
    ids_TK = torch.tensor([[0, 1]])
    (table.gather(ids_TK) if kind == "rows" else table(ids_TK, torch.ones(1, 2).double())).square().sum().backward()
    optimizer.step()
    return int(optimizer.state[table.weight]["step"])


def alone() -> Any:
    """Builds a mesh of this process only, whose mean is still over all ranks: one process has read for all of them."""

    class Alone:
        shard, members, replicas, member = "none", 1, 1, 0

    return Alone()


def scheme_of_replicas(scheme: str) -> None:
    """Checks that a scheme of exchange between replicas gives the same update."""
    before = replicas_module.cheapest_scheme
    replicas_module.cheapest_scheme = lambda *_: scheme
    try:
        compare("none", 1, "rows", "sum", [13, 27], "lazy_adam")
    finally:
        replicas_module.cheapest_scheme = before


def gathered(lengths: list[int]) -> Tensor:
    rank = dist.get_rank()
    own = torch.full((lengths[rank], 2), float(rank), requires_grad=True)
    assert dist.group.WORLD is not None
    every = all_gather(own, lengths, dist.group.WORLD)
    (every * (rank + 1)).sum().backward()
    assert own.grad is not None
    return torch.cat([every.detach(), own.grad])
