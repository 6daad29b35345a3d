"""Deltas of a few lines of a table, which learn while the table stays as it is.

A read returns what the table returns plus the same read of the deltas: the read of a table whose lines are
`line + delta`, by linearity. Gradients reach the deltas, the weights of the read and whatever the weights depend on;
the table needs none.

Letters: T tokens, K lines per read, G groups per read, V values per line, U lines with a delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pkm_lightning.ops import gathered_dot, gathered_rows, weighted_gather

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Int64


class RowDeltas(nn.Module):
    """Deltas that a `ValueTable` adds to its reads within `deltas_added`.

    Args:
        lines_U: numbers of the lines, in ascending order, each once.
        width: values per line V.
        dtype: of the deltas.

    Attributes:
        values_UV: the deltas, zero at first.
    """

    lines_U: Tensor

    def __init__(self, lines_U: Int64[Tensor, " U"], width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("lines_U", lines_U)
        self.values_UV = nn.Parameter(torch.zeros(len(lines_U), width, dtype=dtype, device=lines_U.device))

    def add_sum(
        self,
        y: Tensor,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Tensor:
        """Returns `y`, the weighted sums over the table's lines, with those over the deltas."""
        groups_TK = None if groups_TK is None else groups_TK.to(self.lines_U.device)
        places_TK, weights_TK = self._places(ids_TK), weights_TK.to(self.lines_U.device)
        added = weighted_gather(self._padded(), places_TK, weights_TK, groups_TK=groups_TK, n_groups=n_groups)
        return (y + added.to(y.device)).to(y.dtype)

    def add_dot(self, dots_TK: Tensor, x_TV: Float[Tensor, "T V"], ids_TK: Int[Tensor, "T K"]) -> Tensor:
        """Returns `dots_TK`, the inner products with the table's lines, with those with the deltas."""
        added = gathered_dot(self._padded(), x_TV.to(self.lines_U.device), self._places(ids_TK))
        return (dots_TK + added.to(dots_TK.device)).to(dots_TK.dtype)

    def add_lines(self, lines_TKV: Tensor, ids_TK: Int[Tensor, "T K"]) -> Tensor:
        """Returns `lines_TKV` of the table with the deltas."""
        added = gathered_rows(self._padded(), self._places(ids_TK))
        return (lines_TKV + added.to(lines_TKV.device)).to(lines_TKV.dtype)

    def _padded(self) -> Tensor:
        """Returns the deltas with a line of zeros behind them, for lines without one."""
        return torch.cat([self.values_UV, self.values_UV.new_zeros(1, self.values_UV.shape[1])])

    def _places(self, ids_TK: Tensor) -> Tensor:
        """Returns the places of ids among the deltas, U for a line without one."""
        U, ids_TK = len(self.lines_U), ids_TK.to(self.lines_U)
        places_TK = torch.searchsorted(self.lines_U, ids_TK)
        is_among = (
            self.lines_U[places_TK.clamp(max=U - 1)] == ids_TK if U else torch.zeros_like(ids_TK, dtype=torch.bool)
        )
        return places_TK.where(is_among, U)
