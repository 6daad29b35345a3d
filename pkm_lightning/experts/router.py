"""The router of a mixture of experts: one logit per token and expert, in fp32."""

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
    """A linear map `logits = x W^T`, computed in fp32 whatever the precision of the model or autocast.

    In bf16 logits tie and the selection of experts changes; training then diverges more often (Fedus et al. 2021,
    arXiv 2101.03961, section 2.4, "selective precision").

    Args:
        dim: model dimension D.
        n_experts: experts E.
    """

    def __init__(self, *, dim: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, 1/dim), for logits of about unit variance on normalised inputs."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def match_input(self, input_rms: float) -> None:
        """Divides the weight by the RMS of the input, for logits of about unit variance."""
        with torch.no_grad():
            self.weight.div_(input_rms)

    def diagnostics(self, logits_TE: Tensor, x_TD: Tensor) -> dict[str, Tensor]:
        """Returns the largest absolute logit, `router_logit_max`, and the mean largest probability, `router_top`."""
        return {
            "router_logit_max": logits_TE.abs().amax(),
            "router_top": logits_TE.softmax(-1).amax(-1).mean(),
        }

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Returns logits in fp32 (fp64 for an fp64 model)."""
        with ieee_scores(x_TD):
            # The weight is cast, not stored, in fp32: a cast of the model to bf16 would undo a stored dtype.
            dtype = score_dtype(x_TD)
            return functional.linear(x_TD.to(dtype), self.weight.to(dtype))
