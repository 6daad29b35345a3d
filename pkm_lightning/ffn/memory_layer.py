"""What PKM, Memory and Memory+ have in common: addressing by product keys, then a weighted sum of the slots' values.

Letters: B sequences, T tokens (B * T inside), D model dimension, V values a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.errors import check_integer
from pkm_lightning.ffn.base import FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.memory import Addressing, Cures, Values, product_slots

if TYPE_CHECKING:
    from torch import Tensor


class MemoryLayer(nn.Module):
    """Reads, then does what a subclass adds: here nothing.

    Args:
        addressing: from inputs to slots and weights.
        values: the read of the table, mapped where a cure or an option asks for it.
    """

    def __init__(self, *, addressing: Addressing, values: Values) -> None:
        super().__init__()
        self.addressing = addressing
        self.values = values

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
        """n_keys**2 rows of `value_dim` values (None takes `dim`) from N(0, 1/value_dim)."""
        rows = product_slots(n_keys)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        return TableSpec(rows=rows, dim=dim if value_dim is None else value_dim, trainable=not Cures.of(cures).simvq)

    def reset_parameters(self) -> None:
        """Query xavier-uniform with zero bias, sub-keys and the map of the values as their modules say."""
        self.addressing.reset_parameters()
        self.values.reset_parameters()

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Looks up every token of `x_BTD`; the slots read and their weights are the trace."""
        x_TD = x_BTD.flatten(0, -2)
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        read = self.addressing(x_TD, valid_T)
        pending = self.values.table.start(read.ids_TC, read.weights_TC)
        meanwhile = self.during_read(x_TD)
        y_TV = self.values.finish(pending).to(x_TD.dtype)
        trace = read.trace(x_BTD.shape[:-1]) if context.observe else {}
        y_TD = self.after_read(y_TV, meanwhile)
        return FFNOutput(y_TD.view_as(x_BTD), read.aux_losses, trace, read.step_stats)

    def during_read(self, x_TD: Tensor) -> Tensor | None:
        """What needs the input only, computed while the sums of a split table travel."""
        return None

    def after_read(self, y_TV: Tensor, meanwhile: Tensor | None) -> Tensor:
        """From the read and the result of `during_read` to the output, (T, D)."""
        return y_TV

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Moves the running statistics of a batch normalisation of the queries, where there is one."""
        self.addressing.after_step(stats)

    def reads(self) -> list[TableRead]:
        """One weighted sum a token; the straight-through gradient reads all candidates."""
        return [TableRead(table=self.values.table, ids=self.addressing.training_reads)]

    def slots(self) -> list[Slots]:
        """The rows of the table."""
        return [
            Slots(name="slot", count=self.values.table.rows, tables=(self.values.table,), n_keys=self.addressing.n_keys)
        ]

    def cost(self) -> FFNCost:
        """Query, all 2 S sub-key scores a head, H * K table rows, matrices; top-k and norms count no FLOPs.

        The bytes are those of a read at evaluation: the straight-through gradient reads K times as many in training.
        """
        shared = (*self.addressing.parameters(), *self.values.parameters())
        params = sum(p.numel() for p in self.parameters())
        matrices = params - sum(p.numel() for p in shared)
        table = self.values.table
        rows_read = self.addressing.reads * table.dim

        def flops(reads: int) -> int:
            return self.addressing.flops() + self.values.flops(reads) + 2 * matrices

        return FFNCost(
            params=params,
            table_params=table.size,
            active_params=params + rows_read,
            flops=flops(self.addressing.reads),
            train_flops=flops(self.addressing.training_reads),
            lookup_bytes=rows_read * table.weight.element_size(),
        )
