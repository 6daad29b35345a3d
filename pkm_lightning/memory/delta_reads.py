"""Reads of value tables with deltas on top, for as long as the deltas learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from pkm_lightning.memory.read_recorder import ReadRecorder
from pkm_lightning.memory.row_deltas import RowDeltas
from pkm_lightning.memory.value_table import ValueTable


@contextlib.contextmanager
def deltas_added(
    deltas: Mapping[ValueTable, RowDeltas] | Mapping[ValueTable, ReadRecorder], tables: Iterable[ValueTable] = ()
) -> Iterator[None]:
    """Adds deltas to all reads of their tables within the block, or records these reads.

    Within the block these tables and `tables` themselves learn nothing.
    Nothing is staged and no table has a gradient, whatever its way of learning.
    """
    before = {table: (table.stage, table.weight.requires_grad) for table in {*deltas, *tables}}
    for table in before:
        table.deltas, table.stage = deltas.get(table), None
        table.weight.requires_grad_(False)
    try:
        yield
    finally:
        for table, (stage, requires_grad) in before.items():
            table.deltas, table.stage = None, stage
            table.weight.requires_grad_(requires_grad)
