"""The base of plugins that read one line of a table per token: the line that the token's own id numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import check_integer
from pkm_lightning.ffn.base import FFNContext, Slots, TableRead
from pkm_lightning.memory import TableReference, ValueTable

if TYPE_CHECKING:
    from torch import Tensor


class TokenTableFFN(nn.Module):
    """A plugin whose table has a row per token id, and a slice of it per layer that reads the table.

    A subclass calls `refer` in its constructor.
    """

    position_wise = True

    def refer(self, table: ValueTable, reader: int = 0) -> None:
        """Sets the value table, and the number of the slice that this layer reads, 0 to slices - 1.

        Raises:
            ConfigError: there is no such slice.
        """
        check_integer("table_reader", reader, low=0, high=table.slices - 1)
        self.reference, self.reader = TableReference(table), reader

    @property
    def table(self) -> ValueTable:
        """The table that is read."""
        return self.reference.table

    @property
    def read_dim(self) -> int:
        """Values per read V: those of a row, or of one slice."""
        return self.table.dim // self.table.slices

    def read(self, context: FFNContext) -> Tensor:
        """Returns the line of every token, (B, T, V), in the table's dtype."""
        ahead = context.ids_ahead(self, self.table)
        read_TV = self.table.gather(self._lines(context) if ahead is None else ahead[0]).flatten(1)
        return read_TV.view(*context.input_ids_BT.shape, self.read_dim)

    def trace(self, context: FFNContext) -> dict[str, Tensor]:
        """Returns the rows that were read, each with weight 1, (B, T, 1), while someone observes."""
        if not context.observe:
            return {}
        ids_BTK = context.input_ids_BT.unsqueeze(-1).int()
        return {"slot_ids": ids_BTK, "slot_weights": torch.ones_like(ids_BTK, dtype=torch.float32)}

    def row_ids(self, context: FFNContext) -> list[tuple[ValueTable, Tensor]]:
        """Returns the one read of a forward, whose ids (T, 1) are known before it."""
        return [(self.table, self._lines(context))]

    def reads(self) -> list[TableRead]:
        """Returns one line per token, without weights."""
        return [TableRead(table=self.table, ids=1, groups=1, gather=True)]

    def slots(self) -> list[Slots]:
        """Returns the rows of the table: slot n is token n, for every layer that reads the table."""
        return [Slots(name="slot", count=self.table.rows, tables=(self.table,))]

    def _lines(self, context: FFNContext) -> Tensor:
        return context.input_ids_BT.reshape(-1, 1) * self.table.slices + self.reader
