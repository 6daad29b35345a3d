"""Two sets of sub-keys per head; their products address S * S slots with 2 * S comparisons (Lample et al. 2019).

Letters: T tokens, H heads, 2 halves, S sub-keys a half, E dimension of a half key, K slots kept, J kept a half.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.memory.precision import ieee_scores, score_dtype
from pkm_lightning.memory.query import half_norm
from pkm_lightning.ops import half_topk, product_combine

if TYPE_CHECKING:
    from jaxtyping import Float, Int32
    from torch import Tensor

#: Sub-keys per half at most: the ids of their S * S slots are int32.
MAX_KEYS = math.isqrt(2**31 - 1)


def half_key_dim(key_dim: int) -> int:
    """Half of `ffn.key_dim`, the dimension of both half keys together.

    Raises:
        ConfigError: it is no whole number from 2 on, or odd.
    """
    check_integer("ffn.key_dim", key_dim, low=2)
    if key_dim % 2:
        raise ConfigError(f"ffn.key_dim={key_dim} is odd; it is split into two half keys: use {key_dim + 1}.")
    return key_dim // 2


def product_slots(n_keys: int) -> int:
    """Returns the number of slots that two halves of `n_keys` sub-keys address.

    Raises:
        ConfigError: `n_keys` is not a whole number from 1 to `MAX_KEYS`.
    """
    check_integer("ffn.n_keys", n_keys, low=1, high=MAX_KEYS)
    return n_keys**2


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
        # Sizes are not read off the parameter, which under ZeRO 3 is empty between forwards.
        self.heads, self.n_keys = heads, n_keys
        self.bound = key_dim**-0.5 if bound is None else bound
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
            q_2HTE = q_TH2E.permute(2, 1, 0, 3)
            keys_2HES = self.used(q_TH2E).expand(self.heads, -1, -1, -1).permute(1, 0, 3, 2)
            return torch.bmm(q_2HTE[0], keys_2HES[0]), torch.bmm(q_2HTE[1], keys_2HES[1])

    def search(
        self, q_TH2E: Float[Tensor, "T H 2 E"], knn: int
    ) -> tuple[Float[Tensor, "H T K"], Int32[Tensor, "H T K"]]:
        """Scores and ids of the best `knn` slots of every head, best first, as `product_topk` of `forward` finds them.

        No score of a sub-key that is not kept leaves the processor; equal up to the rounding of the inner products.
        """
        with ieee_scores(q_TH2E):
            q_2HTE = q_TH2E.permute(2, 1, 0, 3)
            keys_2HSE = self.used(q_TH2E).transpose(0, 1)
            # Heads with one set of sub-keys are more queries to it.
            shape_2XTE = (*keys_2HSE.shape[:2], -1, q_2HTE.shape[-1])
            per_half = min(knn, keys_2HSE.shape[2])
            scores_2XTJ, keys_2XTJ = half_topk(q_2HTE.reshape(shape_2XTE), keys_2HSE, per_half)
            shape_HTJ = (self.heads, -1, per_half)
            first, second = (
                (scores_2XTJ[half].reshape(shape_HTJ), keys_2XTJ[half].reshape(shape_HTJ)) for half in (0, 1)
            )
            return product_combine(*first, *second, keys_2HSE.shape[2], knn)

    def used(self, q_TH2E: Tensor) -> Tensor:
        """The sub-keys in the dtype of scores, normalised and scaled if so configured, (H or 1, 2, S, E)."""
        keys_H2SE = self.keys.to(score_dtype(q_TH2E))
        if self.norm is None:
            return keys_H2SE
        return half_norm(self.norm, keys_H2SE) * keys_H2SE.shape[-1] ** -0.5
