"""Which expert for which token: one logit an expert, in fp32.

Letters: T tokens, D model dimension, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.memory.precision import ieee_scores, score_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Router(nn.Module):
    """`logits = x W^T` without bias, computed in fp32 whatever the precision of the model or autocast.

    Rounded to bf16, logits tie and experts change hands; the loss then diverges more often (Fedus et al. 2021, arXiv
    2101.03961, section 2.4, "selective precision").

    Args:
        dim: model dimension D.
        n_experts: experts E.
    """

    def __init__(self, *, dim: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1/dim): logits of about unit variance for normalised inputs."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def diagnostics(self, logits_TE: Tensor, x_TD: Tensor) -> dict[str, Tensor]:
        """`router_logit_max`: the largest absolute logit; `router_top`: mean of a token's largest probability."""
        return {
            "router_logit_max": logits_TE.abs().amax(),
            "router_top": logits_TE.softmax(-1).amax(-1).mean(),
        }

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Logits in fp32 (fp64 for an fp64 model)."""
        with ieee_scores(x_TD):
            dtype = score_dtype(x_TD)
            return functional.linear(x_TD.to(dtype), self.weight.to(dtype))
