"""Safetensors files with the rows of tables, and a plugin whose rows follow from tokens alone.

Letters: B sequences, T tokens, K rows per token, N rows, V values per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pkm_lightning.checkpoints.safetensors import lay_out
from pkm_lightning.ffn import FFNContext, FFNOutput, TableRead, TableSpec
from pkm_lightning.memory import TableReference, ValueTable
from pkm_lightning.memory.stored_rows import StoredRows

#: The rows of a table of an open model of 2026, and the values per row.
HUGE = (320_001_536, 160)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a safetensors file."""
    header, entries = lay_out({name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        for name in entries:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return path


def write_huge(path: Path, written: Mapping[int, Tensor]) -> int:
    """Writes a sparse bf16 table of the shape `HUGE` that is zero but for some rows; returns where its values start."""
    header, entries = lay_out({"ngram_embedding.weight": (HUGE, torch.bfloat16)}, {})
    start = entries["ngram_embedding.weight"].start
    with path.open("wb") as file:
        file.write(header)
        # What was never written takes no place on the disk.
        file.truncate(start + HUGE[0] * HUGE[1] * 2)
        for row, row_V in written.items():
            file.seek(start + row * HUGE[1] * 2)
            file.write(row_V.view(torch.uint8).numpy().data)
    return start


def stored(path: Path, rows_NV: Tensor) -> StoredRows:
    """Writes rows behind seven other bytes, and returns what reads them."""
    path.write_bytes(b"before." + rows_NV.contiguous().view(torch.uint8).numpy().tobytes())
    return StoredRows(path=path, start=7, dtype=rows_NV.dtype, lines=len(rows_NV), width=rows_NV.shape[1])


class TokenRows(nn.Module):
    """Adds a linear map of two rows per token, chosen by the token alone, to the hidden state."""

    position_wise = True

    def __init__(self, *, dim: int, table: ValueTable, rows: int, row_dim: int) -> None:
        super().__init__()
        self._table = TableReference(table)
        self.up = nn.Linear(2 * row_dim, dim)
        self.rows = rows

    @classmethod
    def table_spec(cls, *, rows: int, row_dim: int, **_: object) -> TableSpec:
        return TableSpec(rows=rows, dim=row_dim)

    def row_ids(self, context: FFNContext) -> list[tuple[ValueTable, Tensor]]:
        ids_T = context.input_ids_BT.flatten()
        return [(self._table.table, torch.stack([(ids_T * 7919 + 1) % self.rows, self.rows - 1 - ids_T], 1))]

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        ahead = context.ids_ahead(self, self._table.table)
        ((table, ids_TK),) = self.row_ids(context) if ahead is None else [(self._table.table, ahead[0])]
        read_TC = table.gather(ids_TK).flatten(1).to(self.up.weight.dtype)
        return FFNOutput(self.up(read_TC).view_as(x_BTD))

    def reads(self) -> list[TableRead]:
        return [TableRead(table=self._table.table, ids=2, groups=2)]
