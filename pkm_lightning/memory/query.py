"""The query network: from the input of a layer to one query per head, in two halves.

Letters: P values of a half key, Q = 2 * P values of one query, F values of all queries of a token, X any leading shape;
2 is the two halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice
from pkm_lightning.memory.batch_norm import MaskedBatchNorm
from pkm_lightning.memory.norm import normalised
from pkm_lightning.memory.precision import ieee_scores, score_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

QUERY_NORMS = ("none", "rms", "batch", "layer")


class QueryNetwork(nn.Module):
    """A linear map to `heads` queries of `key_dim`, normalised.

    Args:
        dim: model dimension.
        heads: queries per token.
        key_dim: dimension of both half queries together; even.
        norm: `rms`, RMSNorm with a learned gain on each half (Berges et al. 2024, fig. 3); `batch`, batch normalisation
            of the features of all heads (Lample et al. 2019, section 4.3); `layer`, LayerNorm on the query of each
            head; `none`.

    Raises:
        ConfigError: an unknown `norm`.
    """

    def __init__(self, *, dim: int, heads: int, key_dim: int, norm: str) -> None:
        super().__init__()
        check_choice("ffn.query_norm", norm, QUERY_NORMS)
        self.heads, self.half_dim = heads, key_dim // 2
        self.projection = nn.Linear(dim, heads * key_dim)
        self.norm: nn.RMSNorm | nn.LayerNorm | MaskedBatchNorm | None = None
        if norm == "rms":
            self.norm = nn.RMSNorm(self.half_dim)
        elif norm == "layer":
            self.norm = nn.LayerNorm(key_dim)
        elif norm == "batch":
            self.norm = MaskedBatchNorm(heads * key_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight Xavier-uniform, and sets the bias to 0 and the gain to 1."""
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def match_input(self, input_rms: float) -> None:
        """Divides the projection by the RMS of the input, unless a norm follows that makes up for it."""
        if self.norm is None:
            with torch.no_grad():
                self.projection.weight /= input_rms

    def forward(
        self, x_TD: Float[Tensor, "T D"], valid_T: Bool[Tensor, " T"] | None = None
    ) -> tuple[Float[Tensor, "T H 2 P"], dict[str, Tensor]]:
        """Returns half queries, in fp32 whatever the precision of the model, and the sums for `after_step`."""
        q_TF = self.projection(x_TD)
        stats: dict[str, Tensor] = {}
        with ieee_scores(q_TF):
            q_TF = q_TF.to(score_dtype(q_TF))
            if isinstance(self.norm, MaskedBatchNorm):
                q_TF, stats = self.norm(q_TF, valid_T)
            elif isinstance(self.norm, nn.LayerNorm):
                q_THQ = q_TF.unflatten(-1, (self.heads, -1))
                # In a bf16 model the parameters of the norm are bf16, but the queries are fp32 here.
                weight_Q, bias_Q = self.norm.weight.to(q_TF.dtype), self.norm.bias.to(q_TF.dtype)
                q_TF = functional.layer_norm(q_THQ, weight_Q.shape, weight_Q, bias_Q, self.norm.eps).flatten(1)
            q_TH2P = q_TF.view(-1, self.heads, 2, self.half_dim)
            return half_norm(self.norm, q_TH2P) if isinstance(self.norm, nn.RMSNorm) else q_TH2P, stats

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Updates the running statistics of batch normalisation, if it is the norm."""
        if isinstance(self.norm, MaskedBatchNorm):
            self.norm.after_step(stats)


def half_norm(norm: nn.RMSNorm, x_XP: Float[Tensor, "*X P"]) -> Float[Tensor, "*X P"]:
    """Applies `norm` in the dtype of `x`, so that a gain in bf16 does not reduce fp32 half keys to bf16."""
    assert norm.weight is not None
    return normalised(x_XP, norm.weight.to(x_XP.dtype), norm.eps)
