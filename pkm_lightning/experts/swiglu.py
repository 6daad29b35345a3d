"""Small SwiGLU networks with stacked weights, so that one grouped matmul runs all of them.

Letters: M rows sorted by expert, F hidden dimension of one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.memory.masked_reads import MaskableReads
from pkm_lightning.ops import grouped_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class SwiGLUExperts(MaskableReads):
    """Experts `E_i(x) = (silu(x G_i) * x U_i) O_i` without biases (Shazeer 2020, arXiv 2002.05202, eq. 6).

    Args:
        n_experts: experts E.
        dim: model dimension D.
        hidden_dim: hidden dimension F of one expert.
        n_layers: layers of the model, for the residual scale of the output's initialisation.

    Attributes:
        n_experts: experts E.
    """

    def __init__(self, *, n_experts: int, dim: int, hidden_dim: int, n_layers: int) -> None:
        super().__init__()
        # Not taken from the shape of a parameter, which under DeepSpeed's ZeRO 3 is empty between forwards.
        self.n_experts, self.n_layers = n_experts, n_layers
        self.gate = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.out = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws each expert as the dense FFN: N(0, 1/fan_in), and the output divided by sqrt(2 n_layers)."""
        _, hidden_dim, dim = self.out.shape
        nn.init.normal_(self.gate, std=dim**-0.5)
        nn.init.normal_(self.up, std=dim**-0.5)
        nn.init.normal_(self.out, std=(hidden_dim * 2 * self.n_layers) ** -0.5)

    def zero_output(self) -> None:
        """Sets every O_i to zero."""
        nn.init.zeros_(self.out)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides G and U by the input's RMS; an O of zero grows at its own rate."""
        with torch.no_grad():
            self.gate.div_(input_rms)
            self.up.div_(input_rms)

    def forward(self, x_MD: Float[Tensor, "M D"], counts_E: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        """Runs the first `counts[0]` rows through expert 0, the next `counts[1]` through expert 1, and so on."""
        gate_MF = grouped_linear(x_MD, self.gate, counts_E)
        up_MF = grouped_linear(x_MD, self.up, counts_E)
        return grouped_linear(functional.silu(gate_MF) * up_MF, self.out, counts_E)

    def params_per_expert(self) -> int:
        """Counts the parameters of one expert's three matrices."""
        return sum(p[0].numel() for p in (self.gate, self.up, self.out))
