"""The restriction of a table's learning to chosen rows: all others keep their values and optimizer states, bit by bit.

The gradient is cut, not the update: norm and clipping, weight decay, and the statistics that optimizers keep per column
are those of a step that has read the chosen rows only. Whatever the sharding, each rank restricts the lines it holds.

Letters: U rows that learn, S slices per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.segments import check_indices

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from pkm_lightning.memory.value_table import ValueTable


def restrict_rows(table: ValueTable, rows_U: Int[Tensor, " U"] | None) -> None:
    """Restricts the learning of `table` to the rows `rows_U`, in the step under way and later ones; None: all learn.

    Call it before the norm of the gradient is taken. A deep copy of the table is not restricted.

    Args:
        table: a table that learns by rows.
        rows_U: numbers of rows of the whole table, the same on all ranks, in any order.

    Raises:
        ValueError: the table does not learn by rows, or a row is out of range (checked on the CPU only).

    Example:
        >>> import torch
        >>> from pkm_lightning import TableOptimizer, ValueTable
        >>> table = ValueTable(rows=6, dim=4, learning="rows")
        >>> optimizer, before = TableOptimizer(None, {"table": table}, lr=0.1), table.weight.detach().clone()
        >>> restrict_rows(table, torch.tensor([2]))
        >>> table(torch.tensor([[1, 2]]), torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(-1).nonzero().flatten().tolist()
        [2]
    """
    if table.stage is None:
        raise ValueError("restrict_rows: the table does not learn by rows; make it with learning='rows'.")
    if rows_U is None:
        table.stage.restrict(None)
        return
    check_indices("restrict_rows", "rows", rows_U, table.rows)
    rows_U = rows_U.to(table.weight.device)
    slices_S = torch.arange(table.slices, device=rows_U.device)
    lines_U = (rows_U.unsqueeze(-1) * table.slices + slices_S).flatten()
    low, high = (0, table.n_lines) if table.mesh is None else table.mesh.row_range(table.n_lines)
    is_local_U = (lines_U >= low) & (lines_U < high)
    table.stage.restrict(torch.where(is_local_U, lines_U - low, high - low))
