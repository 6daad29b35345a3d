"""From the layer's input to one query per head, in two halves.

Letters: T tokens, D model dimension, H heads, 2 halves, E dimension of a half key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from pkm_lightning.memory.precision import ieee_scores, score_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class QueryNetwork(nn.Module):
    """A linear map to `heads` queries of `key_dim`, each half RMS-normalised if `norm` (Berges et al. 2024, fig. 3).

    Args:
        dim: model dimension.
        heads: queries a token.
        key_dim: dimension of both half queries together; even.
        norm: RMSNorm with a learned gain on each half.
    """

    def __init__(self, *, dim: int, heads: int, key_dim: int, norm: bool) -> None:
        super().__init__()
        self.heads, self.half_dim = heads, key_dim // 2
        self.projection = nn.Linear(dim, heads * key_dim)
        self.norm = nn.RMSNorm(self.half_dim) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weight, zero bias, unit gain."""
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T H 2 E"]:
        """Half queries, in fp32 whatever the model's precision."""
        q_TH2E = self.projection(x_TD).view(-1, self.heads, 2, self.half_dim)
        with ieee_scores(q_TH2E):
            q_TH2E = q_TH2E.to(score_dtype(q_TH2E))
            return q_TH2E if self.norm is None else half_norm(self.norm, q_TH2E)


def half_norm(norm: nn.RMSNorm, x_XE: Float[Tensor, "*X E"]) -> Float[Tensor, "*X E"]:
    """`norm` applied in the dtype of `x`: a bf16 gain must not pull fp32 half keys down."""
    assert norm.weight is not None
    return functional.rms_norm(x_XE, (x_XE.shape[-1],), norm.weight.to(x_XE.dtype), norm.eps)
