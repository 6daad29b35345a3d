"""The bases of plugins with product keys: of all of them, and of PKM, Memory and Memory+, which sum values of slots.

Letters: C reads per token over all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import check_integer
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import Addressing, Cures, Values, ValueTable, count_parameters, product_slots
from pkm_lightning.memory.batch_norm import MaskedBatchNorm

if TYPE_CHECKING:
    from torch import Tensor


class ProductKeyFFN(nn.Module):
    """A plugin whose `addressing` may normalise its queries with statistics of the whole batch."""

    position_wise = True

    addressing: Addressing

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Updates the running statistics of batch-normalised queries; otherwise does nothing."""
        self.addressing.after_step(stats)

    @property
    def causal_in_training(self) -> bool:
        """Whether a token's output depends on earlier tokens only: not with batch-normalised queries."""
        return not isinstance(self.addressing.query.norm, MaskedBatchNorm)


class MemoryLayer(ProductKeyFFN):
    """A read of the value table; subclasses add what follows it by `during_read` and `after_read`.

        I = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (per head)
        s = activation of those scores, in fp32
        y = sum over heads and slots of s_i V_i

    Args:
        dim: model dimension D.
        table: the value table, n_keys**2 rows of `value_dim` values; None makes one that the layer owns and that learns
            densely. A given one is registered in the layer too, until a model takes it over.
        n_keys: sub-keys per half S; the table has n_keys**2 slots.
        heads: queries per token H.
        knn: slots read per head K, 1 to n_keys**2.
        key_dim: dimension of both half keys together, even.
        query_norm: normalisation of the queries; see `pkm_lightning.memory.QueryNetwork`.
        key_norm: RMSNorm on the sub-keys.
        value_dim: values per slot V; None takes `dim`.
        activation: `softmax` over a head's slots, or `relu` or `sigmoid` of each score.
        temperature: scores are divided by one learned number per head, initially 1.
        key_bound: initial sub-keys are uniform in +-key_bound; None takes 1/sqrt(key_dim).
        value_projection: a learned V x V map of the read.
        score_precision: `ieee` or `tf32x3`, how a GPU may multiply scores; see `pkm_lightning.ops.half_topk`.
        cures: measures against unread slots; see `pkm_lightning.memory.Cures`. None switches all off.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown choice, or a table of another shape.
    """

    def __init__(
        self,
        *,
        dim: int,
        table: ValueTable | None,
        n_keys: int,
        heads: int,
        knn: int,
        key_dim: int,
        query_norm: str,
        key_norm: bool,
        value_dim: int | None = None,
        activation: str = "softmax",
        temperature: bool = False,
        key_bound: float | None = None,
        value_projection: bool = False,
        score_precision: str = "tf32x3",
        cures: Mapping[str, object] | None,
    ) -> None:
        super().__init__()
        spec = self.table_spec(dim=dim, n_keys=n_keys, value_dim=value_dim, cures=cures)
        options = Cures.of(cures)
        self.addressing = Addressing(
            dim=dim,
            heads=heads,
            n_keys=n_keys,
            knn=knn,
            key_dim=key_dim,
            query_norm=query_norm,
            key_norm=key_norm,
            activation=activation,
            temperature=temperature,
            key_bound=key_bound,
            score_precision=score_precision,
            cures=options,
        )
        width = f"model.dim={dim}" if value_dim is None else f"ffn.value_dim={value_dim}"
        (held,) = hold_tables(self, table, spec, named=f"ffn.n_keys={n_keys} and {width}")
        # SimVQ freezes the rows, so that only the map after the read can learn.
        mapped = value_projection or options.simvq
        self.dim, self.values = dim, Values(table=held, out_dim=spec.dim if mapped else None)

    @classmethod
    def table_spec(
        cls,
        *,
        dim: int,
        n_keys: int,
        value_dim: int | None = None,
        cures: Mapping[str, object] | None = None,
        **_: object,
    ) -> TableSpec:
        """Requests n_keys**2 rows of `value_dim` values (None takes `dim`) from N(0, 1/value_dim)."""
        rows = product_slots(n_keys)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        return TableSpec(rows=rows, dim=dim if value_dim is None else value_dim, trainable=not Cures.of(cures).simvq)

    def reset_parameters(self) -> None:
        """Draws queries and sub-keys as `Addressing` does, and the map of the values as `Values` does."""
        self.addressing.reset_parameters()
        self.values.reset_parameters()

    def zero_output(self) -> None:
        """Sets the rows to zero, or where they must stay the map of the values."""
        projection = self.values.projection
        zero_rows(self, self.values.table, None if projection is None else projection.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides queries without a norm by the input's RMS, and multiplies a map of the values by the stream's length.

        Without that map the rows are the output, and have to grow to the length of the stream themselves.
        """
        self.addressing.query.match_input(input_rms)
        if self.values.projection is not None:
            with torch.no_grad():
                self.values.projection.weight *= stream_length

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Looks up every token of `x_BTD`; the trace holds the slots read and their weights."""
        check_input(self, x_BTD, self.dim, context)
        x_TD = x_BTD.flatten(0, -2)
        if self._reads_zeros(context):
            zeros_TV = self.values.finish(lambda: x_TD.new_zeros(len(x_TD), self.values.table.dim)).to(x_TD.dtype)
            return FFNOutput(self.after_read(zeros_TV, self.during_read(x_TD)).view_as(x_BTD))
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        read = self.addressing(x_TD, valid_T)
        # Where ranks hold parts of the table, their sums travel while `during_read` computes.
        pending = self.values.table.start(read.ids_TC, read.weights_TC)
        precomputed = self.during_read(x_TD)
        y_TV = self.values.finish(pending).to(x_TD.dtype)
        trace = read.trace(x_BTD.shape[:-1]) if context.observe else {}
        y_TD = self.after_read(y_TV, precomputed)
        return FFNOutput(y_TD.view_as(x_BTD), read.aux_losses, trace, read.step_stats)

    def _reads_zeros(self, context: FFNContext) -> bool:
        """Returns whether reads return zeros and nobody sees which: the search for slots is most of the layer's cost.

        Ranks that share a table read it all the same, since they may enter and leave `zero_reads` at different times.
        """
        table = self.values.table
        is_unseen = not (self.training or context.observe) and table.deltas is None and len(table.masks) == 1
        return is_unseen and table.reads_zeros and not table.is_split

    def during_read(self, x_TD: Tensor) -> Tensor | None:
        """Computes what depends on the input only, while the sums of a sharded table travel."""
        return None

    def after_read(self, y_TV: Tensor, precomputed: Tensor | None) -> Tensor:
        """Returns the output, (T, D), from the read and the result of `during_read`."""
        return y_TV

    def reads(self) -> list[TableRead]:
        """Returns one weighted sum per token, over all candidates with the straight-through gradient."""
        return [TableRead(table=self.values.table, ids=self.addressing.training_reads)]

    def slots(self) -> list[Slots]:
        """Returns the rows of the table."""
        table = self.values.table
        return [Slots(name="slot", count=table.rows, tables=(table,), n_keys=self.addressing.n_keys)]

    def cost(self) -> FFNCost:
        """Counts the query, all 2 S sub-key scores per head, H * K table rows and the matrices.

        Top-k and norms count no FLOPs. The bytes are those of a read at evaluation: the straight-through gradient reads
        min(K, S)**2 / K times as many in training.
        """
        # Addressing and values count their FLOPs themselves; the remaining parameters are matrices of subclasses.
        params = count_parameters(self)
        matrices = params - count_parameters(self.addressing) - count_parameters(self.values)
        table = self.values.table
        values_read = self.addressing.reads * table.dim

        def flops(reads: int) -> int:
            return self.addressing.flops() + self.values.flops(reads) + 2 * matrices

        return FFNCost(
            params=params,
            table_params=table.size,
            active_params=params + values_read,
            flops=flops(self.addressing.reads),
            train_flops=flops(self.addressing.training_reads),
            lookup_bytes=table.bytes_of(values_read),
        )
