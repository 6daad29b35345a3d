"""PEER, parameter-efficient expert retrieval (He 2024, "Mixture of A Million Experts", arXiv 2407.04153).

Letters: C experts of a token, H heads times K experts per head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice, check_flag
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ffn.memory_layer import ProductKeyFFN
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import Addressing, Cures, TableReference, ValueTable, count_parameters, product_slots

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PEER"]


class PEER(ProductKeyFFN):
    """A mixture of n_keys**2 experts with one hidden neuron each, found by product keys:

        I    = top-k over experts (i, j) of K1[i] q1 + K2[j] q2      (per head; all heads share the experts)
        g    = softmax (or sigmoid) of those scores, in fp32
        e(x) = gelu(<u, x>) v, or gelu(<u, x>) <w, x> v with `glu`
        y    = sum over heads and experts of g_i e_i(x)

    With the paper's `query_norm=batch`, a token's output depends on the whole micro-batch in training. On the CPU no
    tensor of (tokens, heads * knn, dim) is held: inner products and weighted sums read the tables row by row.

    | paper | here |
    |---|---|
    | u, v | rows of the first and of the last table, (n_keys**2, dim) each |
    | (GLU's second input vector) | rows of the middle table of three |
    | C, C' sub-keys | `addressing.keys.keys`, (1, 2, n_keys, key_dim / 2); one set per head without `shared_keys` |
    | q(x) | `addressing.query.projection`, one query per head |

    Args:
        dim: model dimension D.
        table: two value tables, or three with `glu`; None makes them, and the layer owns them.
        n_keys: sub-keys per half S; there are n_keys**2 experts.
        heads: queries per token H.
        knn: experts per head K, 1 to n_keys**2.
        key_dim: dimension of both half keys together, even.
        query_norm: `batch`, `rms`, `layer` or `none`.
        router: `softmax` over a head's experts, or `sigmoid` of each score.
        glu: gated experts, with a second input vector.
        shared_keys: all heads use one set of sub-keys, as in the paper. The baseline of Berges et al. 2024 (arXiv
            2412.09764) has one set per head.
        score_precision: `ieee` or `tf32x3`, how a GPU may multiply scores; see `pkm_lightning.ops.half_topk`.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown choice, or tables of another number or shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import PEER
        >>> PEER(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        *,
        dim: int,
        table: list[ValueTable] | None = None,
        n_keys: int = 256,
        heads: int = 1,
        knn: int = 32,
        key_dim: int = 32,
        query_norm: str = "batch",
        router: str = "softmax",
        glu: bool = False,
        shared_keys: bool = True,
        score_precision: str = "tf32x3",
    ) -> None:
        super().__init__()
        check_flag("ffn.shared_keys", shared_keys)
        check_choice("ffn.router", router, ("softmax", "sigmoid"))
        spec = self.table_spec(dim=dim, n_keys=n_keys, glu=glu)
        self.addressing = Addressing(
            dim=dim,
            heads=heads,
            n_keys=n_keys,
            knn=knn,
            key_dim=key_dim,
            query_norm=query_norm,
            key_norm=False,
            activation=router,
            temperature=False,
            shared_keys=shared_keys,
            score_precision=score_precision,
            cures=Cures(),
        )
        held = hold_tables(self, table, spec, named=f"ffn.glu={glu}, ffn.n_keys={n_keys} and model.dim={dim}")
        self.dim, self.references = dim, nn.ModuleList(map(TableReference, held))

    @classmethod
    def table_spec(cls, *, dim: int, n_keys: int, glu: bool, **_: object) -> TableSpec:
        """Requests input and output vectors of n_keys**2 experts, from N(0, 1/dim).

        Inner products then start at the scale of x.
        """
        check_flag("ffn.glu", glu)
        return TableSpec(rows=product_slots(n_keys), dim=dim, count=3 if glu else 2)

    def reset_parameters(self) -> None:
        """Draws the query xavier-uniform with zero bias, and the sub-keys uniform in +-1/sqrt(key_dim)."""
        self.addressing.reset_parameters()

    def zero_output(self) -> None:
        """Sets the output vectors of the experts to zero."""
        zero_rows(self, self.tables[-1], None)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides queries without a norm by the input's RMS; the tables, which layers may share, stay."""
        self.addressing.query.match_input(input_rms)

    @property
    def tables(self) -> list[ValueTable]:
        """The input vectors of the experts, with GLU their gates, and the output vectors."""
        return [reference.table for reference in cast("Iterable[TableReference]", self.references)]

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Runs every token through its experts; the trace holds the experts and their weights."""
        check_input(self, x_BTD, self.dim, context)
        x_TD = x_BTD.flatten(0, -2)
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        read = self.addressing(x_TD, valid_T)
        down, *gates, up = self.tables
        hidden_TC = functional.gelu(down.dot(x_TD, read.ids_TC))
        for gate in gates:
            hidden_TC = hidden_TC * gate.dot(x_TD, read.ids_TC)
        # One weighted sum over all heads' experts: g_i and the neuron's activation are both scalars, so they multiply.
        y_TD = up(read.ids_TC, read.weights_TC.to(hidden_TC.dtype) * hidden_TC).to(x_TD.dtype)
        trace = read.trace(x_BTD.shape[:-1]) if context.observe else {}
        return FFNOutput(y_TD.view_as(x_BTD), read.aux_losses, trace, read.step_stats)

    def slots(self) -> list[Slots]:
        """Returns the experts; expert n consists of row n of every table."""
        tables = self.tables
        return [Slots(name="slot", count=tables[0].rows, tables=tuple(tables), n_keys=self.addressing.n_keys)]

    def reads(self) -> list[TableRead]:
        """Returns one inner product per table but the last, and a weighted sum over the last."""
        *dots, up = self.tables
        ids = self.addressing.training_reads
        return [*(TableRead(table=table, ids=ids, dot=True) for table in dots), TableRead(table=up, ids=ids)]

    def cost(self) -> FFNCost:
        """Counts the query, all 2 S sub-key scores per head, and H * K experts of two (with GLU three) vectors."""
        tables = self.tables
        # Each value read is multiplied and added once, whether in an inner product or in the weighted sum.
        values_read = sum(self.addressing.reads * table.dim for table in tables)
        params = count_parameters(self)
        return FFNCost(
            params=params,
            table_params=sum(table.size for table in tables),
            active_params=params + values_read,
            flops=self.addressing.flops() + 2 * values_read,
            lookup_bytes=tables[0].bytes_of(values_read),
        )
