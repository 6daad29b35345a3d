"""Two sets of sub-keys per head; their products address S * S slots with 2 * S comparisons (Lample et al. 2019).

Letters: T tokens, H heads, 2 halves, S sub-keys a half, E dimension of a half key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.memory.precision import ieee_scores, score_dtype
from pkm_lightning.memory.query import half_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def half_key_dim(key_dim: int) -> int:
    """Half of `ffn.key_dim`, the dimension of both half keys together.

    Raises:
        ConfigError: it is no whole number from 2 on, or odd.
    """
    check_integer("ffn.key_dim", key_dim, low=2)
    if key_dim % 2:
        raise ConfigError(f"ffn.key_dim={key_dim} is odd; it is split into two half keys: use {key_dim + 1}.")
    return key_dim // 2


class ProductKeys(nn.Module):
    """Scores every half query against its own head's and half's sub-keys.

    Args:
        heads: heads.
        n_keys: sub-keys a half; they address n_keys**2 slots.
        key_dim: dimension of both half keys together; even.
        norm: RMSNorm with a learned gain on each sub-key. Queries that are normalised too make the inner product
            grow with the dimension, so it is then divided by sqrt(key_dim / 2); the gains learn the temperature.
        shared: all heads use one set of sub-keys (PEER), instead of one a head.
        bound: sub-keys start uniform in +-bound; None takes 1/sqrt(key_dim).
    """

    def __init__(
        self, *, heads: int, n_keys: int, key_dim: int, norm: bool, shared: bool = False, bound: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.bound = heads, key_dim**-0.5 if bound is None else bound
        self.keys = nn.Parameter(torch.empty(1 if shared else heads, 2, n_keys, key_dim // 2))
        self.norm = nn.RMSNorm(key_dim // 2) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sub-keys uniform in +-bound, unit gain."""
        nn.init.uniform_(self.keys, -self.bound, self.bound)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, q_TH2E: Float[Tensor, "T H 2 E"]) -> tuple[Float[Tensor, "H T S"], Float[Tensor, "H T S"]]:
        """Scores of the first and of the second half, IEEE fp32, head-major: so the products leave them in memory."""
        with ieee_scores(q_TH2E):
            keys_H2SE = self.keys.to(score_dtype(q_TH2E))
            if self.norm is not None:
                keys_H2SE = half_norm(self.norm, keys_H2SE) * keys_H2SE.shape[-1] ** -0.5
            q_2HTE = q_TH2E.permute(2, 1, 0, 3)
            keys_2HES = keys_H2SE.expand(self.heads, -1, -1, -1).permute(1, 0, 3, 2)
            return torch.bmm(q_2HTE[0], keys_2HES[0]), torch.bmm(q_2HTE[1], keys_2HES[1])
