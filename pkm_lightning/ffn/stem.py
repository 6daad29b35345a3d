"""STEM: an FFN whose up-projection is a table of tokens (Sadhukhan et al. 2026, arXiv 2601.10639).

Letters: F hidden dimension, which is also values per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_integer
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_tokens
from pkm_lightning.ffn.token_table import TokenTableFFN
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import ValueTable, count_parameters

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STEM"]


class STEM(TokenTableFFN):
    """A SwiGLU whose up-projection is the row of token x:

        y = W_d (silu(W_g h) * E_l[x])

    That saves a third of the FFN's matrices and of its FLOPs. The paper has a table per layer (`table.shared=false`,
    the default of `ffn=stem`); a shared one gives all layers the same rows.

    Assumed here, since what is public of the paper's text leaves it open: rows start with unit variance, which the
    up-projection of a normalised h has in a SwiGLU, and every layer is replaced.

    | paper | here |
    |---|---|
    | W_g, W_d | `gate`, `out` |
    | U_l, E_l | the table of layer l |

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the residual scale of the output's initialisation.
        vocab_size: vocabulary; the id of a token is the number of its row.
        table: the value table, a row of F values per token; None makes one, and the layer owns it.
        hidden_dim: hidden dimension F.

    Raises:
        ConfigError: a size out of range, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import FFNContext, STEM
        >>> ids = torch.randint(50, (2, 5))
        >>> STEM(dim=8, vocab_size=50, hidden_dim=16)(torch.randn(2, 5, 8), FFNContext(ids)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, *, dim: int, vocab_size: int, hidden_dim: int, n_layers: int = 1, table: ValueTable | None = None
    ) -> None:
        super().__init__()
        spec = self.table_spec(vocab_size=vocab_size, hidden_dim=hidden_dim)
        named = f"model.vocab_size={vocab_size} and ffn.hidden_dim={hidden_dim}"
        (held,) = hold_tables(self, table, spec, named=named)
        self.refer(held)
        self.n_layers = n_layers
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)
        self.reset_parameters()

    @classmethod
    def table_spec(cls, *, vocab_size: int, hidden_dim: int, **_: object) -> TableSpec:
        """Requests a row of F values per token, from N(0, 1)."""
        check_integer("ffn.hidden_dim", hidden_dim, low=1)
        return TableSpec(rows=vocab_size, dim=hidden_dim, std=1.0)

    def reset_parameters(self) -> None:
        """Draws both matrices from N(0, 1/fan_in), and the output's divided by sqrt(2 n_layers)."""
        nn.init.normal_(self.gate.weight, std=self.gate.in_features**-0.5)
        nn.init.normal_(self.out.weight, std=(self.out.in_features * 2 * self.n_layers) ** -0.5)

    def zero_output(self) -> None:
        """Sets the rows to zero, or where they must stay W_d."""
        zero_rows(self, self.table, self.out.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides W_g by the input's RMS, and multiplies W_d by the stream's length."""
        with torch.no_grad():
            self.gate.weight /= input_rms
            self.out.weight *= stream_length

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Returns the output for every token; the trace holds the rows read."""
        check_tokens(self, x_BTD, self.gate.in_features, context)
        hidden_BTF = functional.silu(self.gate(x_BTD)) * self.read(context).to(x_BTD.dtype)
        return FFNOutput(self.out(hidden_BTF), trace=self.trace(context))

    def cost(self) -> FFNCost:
        """Counts two matrices and one row per token; products of elements count no FLOPs."""
        params = count_parameters(self)
        return FFNCost(
            params=params,
            table_params=self.table.size,
            active_params=params + self.read_dim,
            flops=2 * params,
            lookup_bytes=self.table.bytes_of(self.read_dim),
        )
