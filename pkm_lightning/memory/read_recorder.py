"""The reads of a value table with the gradients of what they returned.

A recorder stands where deltas of the lines would, adds zeros to every read and keeps the gradient that reaches them.
One unit is what one read returns as one vector: `sum_k weights[k] * line[ids[k]]` with its gradient of V values. A
gathered line is a unit of one line, and so is an inner product `<line, x>`, whose gradient with respect to the line is
`gradient of the product * x`.

Letters: T tokens, K lines per read, G groups per read, V values per line, X units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ReadUnits(NamedTuple):
    """Units with a gradient other than zero: lines and weights (X, K), gradient (X, V)."""

    ids_XK: Tensor
    weights_XK: Tensor
    gradients_XV: Tensor


class ReadRecorder(nn.Module):
    """Records the reads of one `ValueTable` within `deltas_added`."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []
        self._dots: list[tuple[Tensor, Tensor, Tensor]] = []
        self._lines: list[tuple[Tensor, Tensor]] = []

    def add_sum(
        self,
        y: Tensor,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Tensor:
        """Returns `y`, weighted sums, as something whose gradient is kept."""
        zeros = torch.zeros_like(y, requires_grad=True)
        weights_TK = weights_TK.detach()
        if groups_TK is None or n_groups is None:
            self._sums.append((ids_TK, weights_TK, zeros))
        else:
            # One unit per group, with the weights of the others at zero.
            is_of_TGK = groups_TK.unsqueeze(1) == torch.arange(n_groups, device=groups_TK.device).unsqueeze(1)
            ids_XK = ids_TK.repeat_interleave(n_groups, 0)
            self._sums.append((ids_XK, (weights_TK.unsqueeze(1) * is_of_TGK).flatten(0, 1), zeros))
        return y + zeros

    def add_dot(self, dots_TK: Tensor, x_TV: Float[Tensor, "T V"], ids_TK: Int[Tensor, "T K"]) -> Tensor:
        """Returns `dots_TK`, inner products, as something whose gradient is kept."""
        zeros_TK = torch.zeros_like(dots_TK, requires_grad=True)
        self._dots.append((ids_TK, x_TV.detach(), zeros_TK))
        return dots_TK + zeros_TK

    def add_lines(self, lines_TKV: Tensor, ids_TK: Int[Tensor, "T K"]) -> Tensor:
        """Returns `lines_TKV` as something whose gradient is kept."""
        zeros_TKV = torch.zeros_like(lines_TKV, requires_grad=True)
        self._lines.append((ids_TK, zeros_TKV))
        return lines_TKV + zeros_TKV

    @torch.no_grad()
    def take(self) -> list[ReadUnits]:
        """Returns the units since the last call whose gradient is not zero, on the CPU."""
        units = [(ids, weights, _gradient(zeros).flatten(0, -2)) for ids, weights, zeros in self._sums]
        for ids_TK, x_TV, zeros_TK in self._dots:
            gradients_TKV = _gradient(zeros_TK).unsqueeze(2) * x_TV.unsqueeze(1)
            ones_X1 = torch.ones_like(zeros_TK).view(-1, 1)
            units.append((ids_TK.reshape(-1, 1), ones_X1, gradients_TKV.flatten(0, 1)))
        for ids_TK, zeros_TKV in self._lines:
            ones_X1 = zeros_TKV.new_ones(ids_TK.numel(), 1)
            units.append((ids_TK.reshape(-1, 1), ones_X1, _gradient(zeros_TKV).flatten(0, 1)))
        self._sums, self._dots, self._lines = [], [], []
        taken = []
        for ids_XK, weights_XK, gradients_XV in units:
            matters_X = gradients_XV.ne(0).any(1)
            parts = (ids_XK.long(), weights_XK.float(), gradients_XV.float())
            taken.append(ReadUnits(*(part[matters_X].cpu() for part in parts)))
        return taken


def _gradient(zeros: Tensor) -> Tensor:
    return torch.zeros_like(zeros) if zeros.grad is None else zeros.grad
