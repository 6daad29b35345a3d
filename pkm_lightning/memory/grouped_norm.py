"""RMSNorm of equal parts of a vector, with gains that are stored as their distance from 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.ops import rms_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class GroupedRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` for each of `groups` equal parts of the last dimension, in fp32 at least.

    Stored around 0, a gain keeps its precision in bf16 as it moves away from 1.

    Args:
        dim: size D of the last dimension.
        groups: parts with a mean square of their own; divides `dim`.
        eps: added to the mean square.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"weight": "norm"}

    def __init__(self, *, dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gains to 1."""
        nn.init.zeros_(self.weight)

    @property
    def gain_D(self) -> Float[Tensor, " D"]:
        """The gains, in fp32 at least."""
        return 1 + self.weight.to(score_dtype(self.weight))

    def forward(self, x_TD: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Returns the normalised parts side by side, in the dtype of `x`."""
        return rms_norm(x_TD, self.gain_D, groups=self.groups, eps=self.eps)
