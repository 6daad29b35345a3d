"""Per-layer embeddings: every layer has an embedding of the token of its own, gated by the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from pkm_lightning.errors import ConfigError, check_choice, check_flag, check_integer, check_range
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_tokens
from pkm_lightning.ffn.token_table import TokenTableFFN
from pkm_lightning.memory import ValueTable, count_parameters
from pkm_lightning.memory.norm import RMSNorm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLE"]


class PLE(TokenTableFFN):
    """The per-layer embeddings of Gemma 3n and Gemma 4, as transformers computes them (`gemma3n`, `gemma4`):

        p = (sqrt(V) E_l[x] + RMSNorm(W_c e)) / sqrt(2)        (sqrt(V) E_l[x] without `context`)
        y = RMSNorm(W_up (act(W_gate h) * p))

    for a token x, its token embedding e, the residual stream h, and the embedding E_l of layer l. With
    `placement.mode=after` the stream becomes h + y after the FFN.

    One table holds the embeddings of all layers: a row per token and a slice of it per layer, as in Gemma. With
    `table.shared=false` each layer has a table of its own, and the function is the same.

    Gemma scales the token embedding by sqrt(D) where the stream begins, and by 1/sqrt(D) before W_c; here neither is
    done. RMSNorm(W_c e) has a gain per layer, and in Gemma one for all layers. The first gain of the output is
    1/sqrt(2 n_layers), that of the other branches here; Gemma's report gives none.

    | Gemma | here |
    |---|---|
    | `embed_tokens_per_layer` | the table |
    | `per_layer_model_projection` (rows of layer l), `per_layer_projection_norm` | `projection`, `projection_norm` |
    | `per_layer_input_gate`, `per_layer_projection`, `post_per_layer_input_norm` | `gate`, `up`, `norm` |
    | `hidden_size_per_layer_input` | `value_dim` V |

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the first gain of the output.
        vocab_size: vocabulary; the id of a token is the number of its row.
        table: the value table, a row of V values per layer for each token; None makes one for this layer alone, which
            owns it.
        table_reader: number of this layer among those that read the table, from 0: its slice of a row.
        value_dim: values per token and layer V; None takes dim // 8, as Gemma 3n E2B has.
        context: add the projection of the token embedding.
        activation: `gelu_tanh` (Gemma's), `gelu` or `silu`.
        norm_eps: epsilon of both norms.

    Raises:
        ConfigError: a size out of range, an unknown activation, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import FFNContext, PLE
        >>> x, context = torch.randn(2, 5, 8), FFNContext(torch.randint(50, (2, 5)), embedding_BTD=torch.randn(2, 5, 8))
        >>> PLE(dim=8, vocab_size=50)(x, context).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    normalises_input = True

    def __init__(
        self,
        *,
        dim: int,
        vocab_size: int,
        n_layers: int = 1,
        table: ValueTable | None = None,
        table_reader: int = 0,
        value_dim: int | None = None,
        context: bool = True,
        activation: str = "gelu_tanh",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_flag("ffn.context", context)
        check_choice("ffn.activation", activation, ("gelu_tanh", "gelu", "silu"))
        check_range("ffn.norm_eps", norm_eps, 0)
        width = _width(dim, value_dim)
        # A given table says how many layers read it.
        readers = 1 if table is None else table.slices
        spec = self.table_spec(dim=dim, vocab_size=vocab_size, table_readers=readers, value_dim=value_dim)
        named = f"model.vocab_size={vocab_size} and {readers} x ffn.value_dim={width}"
        (held,) = hold_tables(self, table, spec, named=named)
        self.refer(held, table_reader)
        self.n_layers, self.activation = n_layers, activation
        self.projection = nn.Linear(dim, width, bias=False) if context else None
        self.projection_norm = RMSNorm(width, eps=norm_eps) if context else None
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.reset_parameters()

    @classmethod
    def table_spec(
        cls, *, dim: int, vocab_size: int, table_readers: int, value_dim: int | None, **_: object
    ) -> TableSpec:
        """Requests a row per token, with V values per layer that reads the table, from N(0, 1/V)."""
        width = _width(dim, value_dim)
        return TableSpec(rows=vocab_size, dim=table_readers * width, std=width**-0.5, slices=table_readers)

    def reset_parameters(self) -> None:
        """Draws all matrices from N(0, 1/fan_in); sets the output's gain to 1/sqrt(2 n_layers), the other to 1."""
        for matrix in (self.gate, self.up, self.projection):
            if matrix is not None:
                nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
        if self.projection_norm is not None:
            self.projection_norm.reset_parameters()
        # The norm makes the output as large as its gain: with 1 it would drown a stream of branches that start smaller.
        nn.init.constant_(self.norm.weight, (2 * self.n_layers) ** -0.5)

    def zero_output(self) -> None:
        """Sets the gain of the output to zero, since rows do not bound an output that is normalised after them.

        The gain has to learn before the rows can.
        """
        nn.init.zeros_(self.norm.weight)

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Returns what is added to the residual stream `x_BTD`; the trace holds the rows read.

        Raises:
            ConfigError: `ffn.context=true`, and no token embeddings in `context`.
        """
        check_tokens(self, x_BTD, self.gate.in_features, context)
        p_BTV = self.read(context).to(x_BTD.dtype) * self.read_dim**0.5
        if self.projection is not None and self.projection_norm is not None:
            if context.embedding_BTD is None:
                raise ConfigError("ffn.context=true reads the token embeddings, which this model does not pass on.")
            # Under autocast matrices give bf16; norms and sums stay in the dtype of the stream.
            projected_BTV = self.projection(context.embedding_BTD).to(x_BTD.dtype)
            p_BTV = (p_BTV + self.projection_norm(projected_BTV)) * 2**-0.5
        y_BTD = self.up(self._activate(self.gate(x_BTD)) * p_BTV)
        return FFNOutput(self.norm(y_BTD.to(x_BTD.dtype)), trace=self.trace(context))

    def cost(self) -> FFNCost:
        """Counts the matrices and one line of the table per token; norms and products of elements count no FLOPs."""
        params = count_parameters(self)
        matrices = sum(m.weight.numel() for m in (self.gate, self.up, self.projection) if m is not None)
        return FFNCost(
            params=params,
            table_params=self.table.size,
            active_params=params + self.read_dim,
            flops=2 * matrices,
            lookup_bytes=self.table.bytes_of(self.read_dim),
        )

    def _activate(self, x_BTV: Tensor) -> Tensor:
        if self.activation == "silu":
            return functional.silu(x_BTV)
        return functional.gelu(x_BTV, approximate="tanh" if self.activation == "gelu_tanh" else "none")


def _width(dim: int, value_dim: int | None) -> int:
    if value_dim is None:
        return max(1, dim // 8)
    check_integer("ffn.value_dim", value_dim, low=1)
    return value_dim
