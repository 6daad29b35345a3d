"""Two sets of sub-keys per head; their products address S * S slots with 2 * S comparisons (Lample et al. 2019).

Letters: P values of a half key, K slots selected per head; 2 is the two halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.memory.precision import ieee_scores, score_dtype
from pkm_lightning.memory.query import half_norm
from pkm_lightning.ops import MAX_SUB_KEYS, product_search

if TYPE_CHECKING:
    from jaxtyping import Float, Int32
    from torch import Tensor


def half_key_dim(key_dim: int) -> int:
    """Returns half of `ffn.key_dim`, the dimension of both half keys together.

    Raises:
        ConfigError: it is odd, or not a whole number from 2.
    """
    check_integer("ffn.key_dim", key_dim, low=2)
    if key_dim % 2:
        raise ConfigError(f"ffn.key_dim={key_dim} is odd; it is split into two half keys: use {key_dim + 1}.")
    return key_dim // 2


def product_slots(n_keys: int) -> int:
    """Returns the number of slots that two halves of `n_keys` sub-keys address.

    Raises:
        ConfigError: `n_keys` is not a whole number from 1 to `MAX_SUB_KEYS`.
    """
    check_integer("ffn.n_keys", n_keys, low=1, high=MAX_SUB_KEYS)
    return n_keys**2


class ProductKeys(nn.Module):
    """The sub-keys of all heads, which score every half query against the sub-keys of its head and half.

    Args:
        heads: number of heads.
        n_keys: sub-keys per half; they address n_keys**2 slots.
        key_dim: dimension of both half keys together; even.
        norm: RMSNorm with a learned gain on each sub-key. With normalised queries the inner product would grow with the
            dimension, so it is then divided by sqrt(key_dim / 2); the gains learn the temperature.
        shared: all heads use one set of sub-keys (PEER), instead of one set per head.
        bound: sub-keys are initialised uniform in +-bound; None takes 1/sqrt(key_dim).
        score_precision: how `search` may multiply on a GPU: `ieee` or `tf32x3`, see `pkm_lightning.ops.half_topk`.
    """

    #: See `pkm_lightning.training.optimizer`.
    parameter_roles: ClassVar[dict[str, str]] = {"keys": "key"}

    def __init__(
        self,
        *,
        heads: int,
        n_keys: int,
        key_dim: int,
        norm: bool,
        shared: bool = False,
        bound: float | None = None,
        score_precision: str = "tf32x3",
    ) -> None:
        super().__init__()
        self.score_precision = score_precision
        # Sizes are stored, because under ZeRO-3 the parameter is empty between forwards.
        self.heads, self.n_keys = heads, n_keys
        self.bound = key_dim**-0.5 if bound is None else bound
        self.keys = nn.Parameter(torch.empty(1 if shared else heads, 2, n_keys, key_dim // 2))
        self.norm = nn.RMSNorm(key_dim // 2) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws sub-keys uniform in +-bound and sets the gain to 1."""
        nn.init.uniform_(self.keys, -self.bound, self.bound)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, q_TH2P: Float[Tensor, "T H 2 P"]) -> tuple[Float[Tensor, "H T S"], Float[Tensor, "H T S"]]:
        """Scores the first and the second half in IEEE fp32, head-major, which is the layout of batched products."""
        with ieee_scores(q_TH2P):
            q_2HTP = q_TH2P.permute(2, 1, 0, 3)
            keys_2HPS = self.score_keys(q_TH2P).expand(self.heads, -1, -1, -1).permute(1, 0, 3, 2)
            return torch.bmm(q_2HTP[0], keys_2HPS[0]), torch.bmm(q_2HTP[1], keys_2HPS[1])

    def search(
        self, q_TH2P: Float[Tensor, "T H 2 P"], knn: int
    ) -> tuple[Float[Tensor, "T H K"], Int32[Tensor, "T H K"]]:
        """Returns scores and ids of the best `knn` slots of every head, best first.

        The result is `product_topk` of `forward`, up to the rounding of the inner products, but only the scores of
        selected sub-keys are written to memory.
        """
        with ieee_scores(q_TH2P):
            return product_search(q_TH2P, self.score_keys(q_TH2P), knn, precision=self.score_precision)

    def score_keys(self, q_TH2P: Tensor) -> Tensor:
        """Returns the sub-keys as the scores use them, (H or 1, 2, S, P): normalised and scaled if so configured."""
        keys_H2SP = self.keys.to(score_dtype(q_TH2P))
        if self.norm is None:
            return keys_H2SP
        return half_norm(self.norm, keys_H2SP) * keys_H2SP.shape[-1] ** -0.5
