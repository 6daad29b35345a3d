"""A memory whose slots are the buckets of a locality-sensitive hash (Charikar 2002, doi 10.1145/509907.509965).

Letters: Z bits of a hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_integer
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, TableRead, TableSpec
from pkm_lightning.ffn.held_tables import hold_tables
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.memory import TableReference, ValueTable
from pkm_lightning.memory.precision import ieee_scores, score_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HashedMemory"]


class HashedMemory(nn.Module):
    """One read per token, from the slot that the signs of random projections address:

        h(x) = (sum over bits z of 2**z [<p_z, x> > 0]) mod N      (Charikar 2002, section 3)
        y    = sigmoid(<w, x>) V_h(x)

    | paper | here |
    |---|---|
    | r, a random vector | a row of `projection`, fixed, with entries of +1 and -1 |
    | h_r(u) | one bit of the id |
    | | w: `gate` |

    Args:
        dim: model dimension D, also the values per slot V.
        table: the value table; None makes one, and the layer owns it.
        n_slots: slots N, 1 to 2**bits.
        bits: bits of the hash Z, 1 to 30.

    Raises:
        ConfigError: a size out of range, or a table of another shape.
    """

    projection: Tensor

    def __init__(self, *, dim: int, table: ValueTable | None = None, n_slots: int = 1000, bits: int = 20) -> None:
        super().__init__()
        spec = self.table_spec(dim=dim, n_slots=n_slots, bits=bits)
        (held,) = hold_tables(self, table, spec, named=f"ffn.n_slots={n_slots} and model.dim={dim}")
        self.reference = TableReference(held)
        self.gate = nn.Linear(dim, 1, bias=False)
        self.register_buffer("projection", torch.empty(bits, dim))
        self.reset_parameters()

    @classmethod
    def table_spec(cls, *, dim: int, n_slots: int, bits: int, **_: object) -> TableSpec:
        """Requests n_slots rows of `dim` values from N(0, 1/dim)."""
        check_integer("ffn.bits", bits, low=1, high=30)
        check_integer("ffn.n_slots", n_slots, low=1, high=2**bits)
        return TableSpec(rows=n_slots, dim=dim)

    def reset_parameters(self) -> None:
        """Draws the gate from N(0, 1/dim) and new projections."""
        nn.init.normal_(self.gate.weight, std=self.gate.in_features**-0.5)
        with torch.no_grad():
            self.projection.bernoulli_(0.5).mul_(2).sub_(1)

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Reads the slot of every token; the trace holds the slots and their weights."""
        check_input(self, x_BTD, self.gate.in_features, context)
        ids_BT1, weights_BT1 = self._slots_and_weights(x_BTD)
        y_TD = self.reference.table(ids_BT1.flatten(0, -2), weights_BT1.flatten(0, -2)).to(x_BTD.dtype)
        trace = {"slot_ids": ids_BT1, "slot_weights": weights_BT1.detach()} if context.observe else {}
        return FFNOutput(y_TD.view_as(x_BTD), trace=trace)

    def _slots_and_weights(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        # In fp32 even under autocast, so that rounding seldom changes a bit.
        with ieee_scores(x_BTD):
            dtype = score_dtype(x_BTD)
            bits_BTZ = functional.linear(x_BTD.to(dtype), self.projection.to(dtype)) > 0
            places_Z = 2 ** torch.arange(bits_BTZ.shape[-1], dtype=torch.int32, device=x_BTD.device)
            ids_BT1 = (bits_BTZ * places_Z).sum(-1, keepdim=True, dtype=torch.int32) % self.reference.table.rows
            return ids_BT1, functional.linear(x_BTD.to(dtype), self.gate.weight.to(dtype)).sigmoid()

    def slots(self) -> list[Slots]:
        """Returns the rows of the table."""
        table = self.reference.table
        return [Slots(name="slot", count=table.rows, tables=(table,))]

    def reads(self) -> list[TableRead]:
        """Returns the one read per token."""
        return [TableRead(table=self.reference.table, ids=1)]

    def cost(self) -> FFNCost:
        """Counts the projections, the gate and one row."""
        table, params = self.reference.table, self.gate.weight.numel()
        return FFNCost(
            params=params,
            table_params=table.size,
            active_params=params + table.dim,
            flops=2 * (self.projection.numel() + params + table.dim),
            lookup_bytes=table.dim * table.weight.element_size(),
        )
