"""Engram: a table of hashed n-grams, gated by the hidden state (Cheng et al. 2026, arXiv 2601.07372).

Letters: K reads per token over all orders and heads, S residual streams, C = D / S values per stream, P tokens with
those in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import ConfigError, check_choice, check_flag, check_integer, check_range
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_tokens
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import TableReference, ValueTable, count_parameters
from pkm_lightning.memory.canonical_tokens import canonical_ids
from pkm_lightning.memory.causal_convolution import CausalConvolution
from pkm_lightning.memory.grouped_norm import GroupedRMSNorm
from pkm_lightning.memory.token_addressing import NGramAddressing, head_sizes, padded_rows, reads_per_token
from pkm_lightning.ops import rms_norm_dot

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engram"]

#: A tap takes a step of the forward, and a token in front of the text memory like any other.
_MOST_TAPS, _LARGEST_DILATION = 64, 4096


class Engram(nn.Module):
    """A lookup of the last tokens' n-grams, added to the residual stream in front of a block.

    Sections 2.2 and 2.3 of the paper, for a hidden state h; the layer reads the residual stream itself:

        e     = [V[id_1], ..., V[id_K]]                  (ids of `NGramAddressing`: one row per order and head)
        s     = <RMSNorm(W_K e), RMSNorm(h)> / sqrt(C)
        alpha = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))
        v     = alpha W_V e
        y     = v + SiLU(conv(RMSNorm(v)))

    A residual stream of S parts (hyper-connections) has one key, gate and set of filters per part, and one value for
    all. The root in the gate is that of Qwen's layer, as are zero-centred gains. The convolution starts at zero, the
    value does not: keys, gate and rows would have no gradient with it. Where s is near 0 the root is steep, and makes
    gradients sensitive to rounding; `gate=no_root` leaves it out, as the equation of the paper does.

    | paper | here |
    |---|---|
    | E_{n,k}, all embedding tables | `table.weight`, a range of rows per order and head |
    | W_K, W_V | `key`, `value` |
    | N, K, M | `orders`, `heads`, hyper-connections: `streams` |
    | tokenizer compression P | `canonical` |
    | w, delta (kernel 4, dilation N) | `kernel`, `dilation` |

    The layer looks at earlier tokens, through `context.past` where a cache holds them. Padding and other documents
    count as end-of-text tokens in the n-grams and as zeros in the convolution; in a batch without `doc_ids` an
    end-of-text token limits n-grams, but not the convolution.

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the scale of the initial value.
        vocab_size: vocabulary of the model.
        table: the value table; None makes one, and the layer owns it.
        table_number: number of the table among those of the model, which decides primes and multipliers.
        orders: lengths of the n-grams, each 2 to 64.
        heads: hashes per order.
        rows: base size of a head's range of rows; see `head_sizes`.
        row_dim: values per row V; None takes dim / K.
        kernel: taps of the convolution, 1 to 64.
        dilation: tokens between taps, 1 to 4,096; None takes the largest order.
        canonical: hash tokens by their text without case, white space and Unicode form; see `canonical_ids`.
        gate: `sigmoid` as above, `no_root` (alpha = sigmoid(s)), or `none` (alpha = 1, without keys).
        streams: parts S of the residual stream; divides `dim`.
        seed: of the hash.
        row_multiple: the rows of the table are a multiple of this.
        norm_eps: added to the mean squares of the norms.
        end_id: the end-of-text token; None takes that of the tokenizer.

    Raises:
        ConfigError: a value out of range, sizes that do not divide, an unknown gate, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import FFNContext, Engram
        >>> ids = torch.randint(50, (2, 5))
        >>> Engram(dim=8, vocab_size=50, rows=64)(torch.randn(2, 5, 8), FFNContext(ids)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    uses_past = True
    normalises_input = True
    buffer_keys = ("orders", "heads", "rows", "canonical", "seed", "end_id")

    def __init__(
        self,
        *,
        dim: int,
        vocab_size: int,
        n_layers: int = 1,
        table: ValueTable | None = None,
        table_number: int = 0,
        orders: Sequence[int] = (2, 3),
        heads: int = 2,
        rows: int = 8192,
        row_dim: int | None = None,
        kernel: int = 4,
        dilation: int | None = None,
        canonical: bool = False,
        gate: str = "sigmoid",
        streams: int = 1,
        seed: int = 1234,
        row_multiple: int = 128,
        norm_eps: float = 1e-6,
        end_id: int | None = None,
    ) -> None:
        super().__init__()
        spec = self.table_spec(
            dim=dim,
            table_number=table_number,
            orders=orders,
            heads=heads,
            rows=rows,
            row_dim=row_dim,
            row_multiple=row_multiple,
        )
        check_integer("ffn.kernel", kernel, low=1, high=_MOST_TAPS)
        dilation = max(orders) if dilation is None else dilation
        check_integer("ffn.dilation", dilation, low=1, high=_LARGEST_DILATION)
        check_flag("ffn.canonical", canonical)
        check_choice("ffn.gate", gate, ("sigmoid", "no_root", "none"))
        check_integer("ffn.streams", streams, low=1)
        check_range("ffn.norm_eps", norm_eps, 0)
        if dim % streams:
            raise ConfigError(f"ffn.streams={streams} does not divide model.dim={dim}; use a divisor.")
        named = f"ffn.rows={rows}, ffn.heads={heads}, ffn.orders={list(orders)} and ffn.row_dim={row_dim}"
        (held,) = hold_tables(self, table, spec, named=named)
        self.addressing = NGramAddressing(
            vocab_size=vocab_size,
            orders=orders,
            heads=heads,
            rows=rows,
            table_number=table_number,
            seed=seed,
            end_id=0 if end_id is None else end_id,
        )
        self.streams, self.canonical, self.takes_end_id, self.n_layers = streams, canonical, end_id is None, n_layers
        self.dim, self.reference = dim, TableReference(held)
        width, norm = self.addressing.reads * spec.dim, partial(GroupedRMSNorm, dim=dim, groups=streams, eps=norm_eps)
        self.takes_root = gate == "sigmoid"
        self.key = None if gate == "none" else nn.Linear(width, dim, bias=False)
        self.key_norm = None if gate == "none" else norm()
        self.query_norm = None if gate == "none" else norm()
        self.value = nn.Linear(width, dim // streams, bias=False)
        self.conv_norm = norm()
        self.conv = CausalConvolution(dim=dim, kernel=kernel, dilation=dilation)
        self.reset_parameters()

    @classmethod
    def table_spec(
        cls,
        *,
        dim: int,
        table_number: int,
        orders: Sequence[int],
        heads: int,
        rows: int,
        row_dim: int | None,
        row_multiple: int,
        **_: object,
    ) -> TableSpec:
        """Requests the rows of all heads from N(0, 1 / (K row_dim)): what a token reads has length 1.

        That is the length of a token's initial embedding.
        """
        reads = reads_per_token(orders, heads)
        if row_dim is None and dim % reads:
            raise ConfigError(
                f"ffn.row_dim=null divides model.dim={dim} by {reads} reads per token, which leaves a rest; set "
                "ffn.row_dim, or another ffn.heads."
            )
        values = dim // reads if row_dim is None else row_dim
        check_integer("ffn.row_dim", values, low=1)
        total = padded_rows(head_sizes(reads, rows, table_number), row_multiple)
        return TableSpec(rows=total, dim=values, std=(reads * values) ** -0.5)

    def reset_parameters(self) -> None:
        """Computes the addresses anew, and draws W_K from N(0, 1/(K V)) and W_V from that over 2 n_layers.

        The factor is that of one of the 2 n_layers branches of the residual stream. The convolution is zero.
        """
        self.addressing.reset_parameters()
        for norm in (self.key_norm, self.query_norm, self.conv_norm):
            if norm is not None:
                norm.reset_parameters()
        std = self.value.in_features**-0.5
        if self.key is not None:
            nn.init.normal_(self.key.weight, std=std)
        nn.init.normal_(self.value.weight, std=std * (2 * self.n_layers) ** -0.5)
        self.conv.reset_parameters()

    def zero_output(self) -> None:
        """Sets the rows to zero, or where they must stay W_V.

        Raises:
            ConfigError: `norm_eps` is 0, and the norm in front of the convolution divides a value of zero by zero.
        """
        if self.conv_norm.eps == 0:
            raise ConfigError("ffn.norm_eps=0 normalises an output of zero to NaN; set 1e-6 to start with one.")
        zero_rows(self, self.reference.table, self.value.weight)

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Takes the end-of-text token from the tokenizer of the data, and with `canonical` its folded vocabulary.

        Raises:
            ConfigError: there is no tokenizer, or none that has what is needed.
        """
        W = len(self.addressing.canonical_ids)
        if self.takes_end_id:
            end_id = getattr(tokenizer, "eos_id", None)
            if end_id is None:
                raise ConfigError(
                    "ffn.end_id=null takes the end-of-text token of the data's tokenizer, which has none (eos_id); set "
                    "ffn.end_id to the id of a token that ends documents."
                )
            check_integer("the tokenizer's eos_id", end_id, low=0, high=W - 1)
            self.addressing.end_id.fill_(end_id)
        if self.canonical:
            if not hasattr(tokenizer, "decode"):
                raise ConfigError(
                    "ffn.canonical=true needs the texts of a tokenizer, and there is none here; set false."
                )
            known = min(W, getattr(tokenizer, "vocab_size", W))
            folded = torch.tensor(canonical_ids(tokenizer.decode([token]) for token in range(known)))
            self.addressing.canonical_ids[:known].copy_(folded)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Multiplies W_V by the stream's length; keys and gate read a normalised input."""
        with torch.no_grad():
            self.value.weight *= stream_length

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Looks up every token's n-grams; the trace holds the rows, weighted by the mean gate of the streams."""
        check_tokens(self, x_BTD, self.dim, context)
        ahead = context.ids_ahead(self, self.reference.table)
        ids_BTK = self._ids(context) if ahead is None else ahead[0].unflatten(0, x_BTD.shape[:2])
        e_BTX = self._read(ids_BTK, x_BTD)
        alpha_BTS1 = self._gate(e_BTX, x_BTD)
        # One value for all streams, each with its gate.
        v_BTD = (alpha_BTS1 * self.value(e_BTX).unsqueeze(-2)).flatten(-2)
        y_BTD = v_BTD + functional.silu(self._convolved(v_BTD, context))
        trace = {}
        if context.observe:
            alpha_BT1 = alpha_BTS1.detach().mean(-2)
            trace = {"slot_ids": ids_BTK, "slot_weights": alpha_BT1.expand(ids_BTK.shape).contiguous()}
        return FFNOutput(y_BTD.type_as(x_BTD), trace=trace)

    def _ids(self, context: FFNContext) -> Tensor:
        tokens_BT, valid_BT = context.input_ids_BT, context.valid_BT
        if valid_BT is not None:
            tokens_BT = tokens_BT.where(valid_BT, -1)
        before = self.addressing.context
        if context.past is None:
            tokens_BP = functional.pad(tokens_BT, (before, 0), value=-1)
        else:
            tokens_BP = context.past.extend("tokens", tokens_BT, before, fill=-1)
        ids_BTK: Tensor = self.addressing(tokens_BP, context.doc_ids_BT)
        return ids_BTK

    def _read(self, ids_BTK: Tensor, x_BTD: Tensor) -> Tensor:
        """Returns the rows of each token side by side, (B, T, K * V)."""
        rows_TKV = self.reference.table.gather(ids_BTK.flatten(0, 1))
        return rows_TKV.flatten(1).to(x_BTD.dtype).unflatten(0, x_BTD.shape[:2])

    def _gate(self, e_BTX: Tensor, x_BTD: Tensor) -> Tensor:
        """Returns alpha per stream, (B, T, S, 1)."""
        if self.key is None or self.key_norm is None or self.query_norm is None:
            return x_BTD.new_ones(*x_BTD.shape[:2], self.streams, 1)
        gain_D, eps = self.key_norm.gain_D * self.query_norm.gain_D, self.key_norm.eps
        # Both norms and the inner product in one pass, since each of them alone would take as long.
        s_BTS = rms_norm_dot(self.key(e_BTX), x_BTD, gain_D, groups=self.streams, eps=eps)
        s_BTS1 = s_BTS.unsqueeze(-1) * (x_BTD.shape[-1] // self.streams) ** -0.5
        if self.takes_root:
            # The clamp bounds the slope of the root near 0.
            s_BTS1 = s_BTS1.sign() * s_BTS1.abs().clamp(min=1e-6).sqrt()
        return torch.sigmoid(s_BTS1).type_as(x_BTD)

    def _convolved(self, v_BTD: Tensor, context: FFNContext) -> Tensor:
        normed_BTD = self.conv_norm(v_BTD)
        if context.valid_BT is not None:
            normed_BTD = normed_BTD * context.valid_BT.unsqueeze(-1)
        length, normed_BPD = normed_BTD.shape[1], normed_BTD
        if context.past is not None:
            normed_BPD = context.past.extend("convolution", normed_BTD, self.conv.context, fill=0.0)
        convolved_BTD: Tensor = self.conv(normed_BPD, context.doc_ids_BT, length=length)
        return convolved_BTD

    @torch.no_grad()
    def diagnostics(self, output: FFNOutput, x_BTD: Tensor, context: FFNContext) -> dict[str, Tensor]:
        """Returns `memory_gate`, the mean of alpha, and `memory_share`, the mean of |y| / |h|, over real tokens."""
        alpha_BT = self._gate(self._read(self._ids(context), x_BTD), x_BTD).mean((-2, -1))
        share_BT = output.y_BTD.norm(dim=-1) / x_BTD.norm(dim=-1).clamp(min=1e-20)
        valid_BT = torch.ones_like(alpha_BT) if context.valid_BT is None else context.valid_BT.to(alpha_BT.dtype)
        weights_BT = valid_BT / valid_BT.sum().clamp(min=1)
        return {"memory_gate": (alpha_BT * weights_BT).sum(), "memory_share": (share_BT * weights_BT).sum()}

    def row_ids(self, context: FFNContext) -> list[tuple[ValueTable, Tensor]]:
        """Returns the table and the rows that a training forward reads, (T, K)."""
        return [(self.reference.table, self._ids(context).flatten(0, 1))]

    def slots(self) -> list[Slots]:
        """Returns the rows of the table that belong to a head."""
        table, count = self.reference.table, self.addressing.readable_rows
        return [Slots(name="slot", count=count, tables=(table,), padding=table.rows - count)]

    def reads(self) -> list[TableRead]:
        """Returns one gather of K rows per token."""
        return [
            TableRead(table=self.reference.table, ids=self.addressing.reads, groups=self.addressing.reads, gather=True)
        ]

    def cost(self) -> FFNCost:
        """Counts W_K, W_V and the filters; a read adds nothing up."""
        table = self.reference.table
        params = count_parameters(self)
        matrices = [self.value.weight, self.conv.weight] + ([] if self.key is None else [self.key.weight])
        return FFNCost(
            params=params,
            table_params=table.size,
            active_params=params + self.value.in_features,
            flops=2 * sum(matrix.numel() for matrix in matrices),
            lookup_bytes=table.bytes_of(self.value.in_features),
        )
