"""The read of a value table, and a linear map that may follow it.

Letters: C reads per token over all heads, O output dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.memory.table_reference import TableReference
from pkm_lightning.memory.value_table import ValueTable

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Values(nn.Module):
    """Weighted sums of table rows, followed by a linear map if `out_dim` is given.

    Because `sum_i w_i (W v_i) = W sum_i w_i v_i`, a map after the sum maps every row, read or not. With frozen rows
    this is SimVQ on the values (Zhu et al. 2024, arXiv 2411.02038) without further reads.

    Args:
        table: the value table.
        out_dim: output dimension O of the map; None: no map.
    """

    def __init__(self, *, table: ValueTable, out_dim: int | None) -> None:
        super().__init__()
        self.reference = TableReference(table)
        dim = table.dim
        self.projection = None if out_dim is None else nn.Linear(dim, out_dim, bias=False)
        self.reset_parameters()

    @property
    def table(self) -> ValueTable:
        """The table that is read."""
        return self.reference.table

    def reset_parameters(self) -> None:
        """Draws the map from N(0, 1/V), so that it keeps the variance of a read."""
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def forward(self, ids_TC: Int[Tensor, "T C"], weights_TC: Float[Tensor, "T C"]) -> Float[Tensor, "T O"]:
        """Returns the reads in the dtype of the table, or of the map where there is one."""
        return self.finish(self.table.start(ids_TC, weights_TC))

    def finish(self, read: Callable[[], Tensor]) -> Float[Tensor, "T O"]:
        """Calls `read`, which `table.start` has returned, and maps its result."""
        y_TV = read()
        return y_TV if self.projection is None else self.projection(y_TV.to(self.projection.weight.dtype))

    def flops(self, reads: int) -> int:
        """Returns the forward FLOPs per token of `reads` rows: those of the map and of the weighted sum."""
        matrix = 0 if self.projection is None else self.projection.weight.numel()
        return 2 * (matrix + reads * self.table.dim)
