"""Two sets of sub-keys per head; their products address S * S slots with 2 * S comparisons (Lample et al. 2019).

Letters: T tokens, H heads, 2 halves, S sub-keys a half, E dimension of a half key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.memory.precision import ieee_scores, score_dtype
from pkm_lightning.memory.query import half_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ProductKeys(nn.Module):
    """Scores every half query against its own head's and half's sub-keys.

    Args:
        heads: heads, each with sub-keys of its own.
        n_keys: sub-keys a half; they address n_keys**2 slots.
        key_dim: dimension of both half keys together; even.
        norm: RMSNorm with a learned gain on each sub-key. Queries that are normalised too make the inner product
            grow with the dimension, so it is then divided by sqrt(key_dim / 2); the gains learn the temperature.
    """

    def __init__(self, *, heads: int, n_keys: int, key_dim: int, norm: bool) -> None:
        super().__init__()
        self.key_dim = key_dim
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, key_dim // 2))
        self.norm = nn.RMSNorm(key_dim // 2) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sub-keys uniform in +-1/sqrt(key_dim), unit gain."""
        bound = self.key_dim**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, q_TH2E: Float[Tensor, "T H 2 E"]) -> tuple[Float[Tensor, "H T S"], Float[Tensor, "H T S"]]:
        """Scores of the first and of the second half, IEEE fp32, head-major: so the products leave them in memory."""
        with ieee_scores(q_TH2E):
            keys_H2SE = self.keys.to(score_dtype(q_TH2E))
            if self.norm is not None:
                keys_H2SE = half_norm(self.norm, keys_H2SE) * keys_H2SE.shape[-1] ** -0.5
            q_2HTE, keys_2HES = q_TH2E.permute(2, 1, 0, 3), keys_H2SE.permute(1, 0, 3, 2)
            return torch.bmm(q_2HTE[0], keys_2HES[0]), torch.bmm(q_2HTE[1], keys_2HES[1])
