"""The dense feed-forward network, the baseline of every other plugin.

Letters: F hidden dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice, check_integer
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput
from pkm_lightning.ffn.inputs import check_input

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense"]


class Dense(nn.Module):
    """Two or three matrices without biases:

        swiglu        y = W_out (silu(W_gate x) * W_up x)      (Shazeer 2020, arXiv 2002.05202, eq. 6)
        gelu          y = W_out gelu(W_up x)                   (Hendrycks & Gimpel 2016, arXiv 1606.08415)
        squared_relu  y = W_out relu(W_up x)**2                (So et al. 2021, arXiv 2109.08668)

    | paper (SwiGLU) | here |
    |---|---|
    | W, V, W_2 | `gate`, `up`, `out` |

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the residual scale of the output's initialisation.
        hidden_dim: hidden dimension F.
        activation: `swiglu`, `gelu` or `squared_relu`.

    Raises:
        ConfigError: an unknown activation or no hidden dimension.

    Example:
        >>> import torch
        >>> from pkm_lightning import Dense
        >>> Dense(dim=8, hidden_dim=16)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    position_wise = True

    def __init__(self, *, dim: int, n_layers: int = 1, hidden_dim: int, activation: str = "swiglu") -> None:
        super().__init__()
        check_integer("ffn.hidden_dim", hidden_dim, low=1)
        check_choice("ffn.activation", activation, ("swiglu", "gelu", "squared_relu"))
        self.n_layers, self.activation = n_layers, activation
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all matrices from N(0, 1/fan_in), and the output's divided by sqrt(2 n_layers)."""
        dim, hidden_dim = self.out.weight.shape
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=dim**-0.5)
        nn.init.normal_(self.up.weight, std=dim**-0.5)
        # 2 n_layers branches add up in the residual stream; this scale (GPT-2's) keeps its variance.
        nn.init.normal_(self.out.weight, std=(hidden_dim * 2 * self.n_layers) ** -0.5)

    def zero_output(self) -> None:
        """Sets W_out to zero."""
        nn.init.zeros_(self.out.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides W_gate and W_up by the input's RMS; a W_out of zero grows at its own rate, as all of it learns."""
        with torch.no_grad():
            self.up.weight /= input_rms
            if self.gate is not None:
                self.gate.weight /= input_rms

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Returns the network's output for every token; `context` is unused."""
        check_input(self, x_BTD, self.up.in_features, context)
        if self.gate is not None:
            hidden_BTF = functional.silu(self.gate(x_BTD)) * self.up(x_BTD)
        elif self.activation == "gelu":
            hidden_BTF = functional.gelu(self.up(x_BTD))
        else:
            hidden_BTF = functional.relu(self.up(x_BTD)).square()
        return FFNOutput(self.out(hidden_BTF))

    def cost(self) -> FFNCost:
        """Returns the cost: every parameter is active for every token."""
        params = sum(p.numel() for p in self.parameters())
        return FFNCost(params=params, active_params=params, flops=2 * params)
