"""Value tables in a plan: what a device holds of them, and what it receives for their reads and updates.

Letters as in `pkm_lightning.capacity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkm_lightning.ffn import HasReads, TableRead
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.replicas import received_bytes
from pkm_lightning.ops.row_update import state_bytes

if TYPE_CHECKING:
    from pkm_lightning.capacity.setting import Setting
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class TableFigures:
    """Bytes on the device or host that holds the tables, and bytes that a device receives per step; None: unknown."""

    part: int = 0
    gradients: int = 0
    states: int = 0
    staged: int | None = 0
    merged: int | None = 0
    forward: int | None = 0
    backward: int | None = 0
    replicas: int | None = 0
    statistics: int | None = 0

    def __add__(self, other: TableFigures) -> TableFigures:
        sums: dict[str, Any] = {}
        for field in fields(self):
            one, another = getattr(self, field.name), getattr(other, field.name)
            sums[field.name] = None if one is None or another is None else one + another
        return TableFigures(**sums)


def table_figures(model: Transformer, setting: Setting) -> tuple[TableFigures, TableFigures, tuple[str, ...]]:
    """Returns the sums over all tables that move with the model, and over those that stay in host memory.

    Also the classes of plugins with a table but without `reads()`.
    """
    reads, unknown = _reads(model)
    totals = {False: TableFigures(), True: TableFigures()}
    for table in model.value_tables:
        calls = None if unknown or setting.tokens is None else [read for read in reads if read.table is table]
        one = _OneTable(table, setting, split=any(table is shared for shared in model.tables))
        totals[one.on_host] += one.figures(calls)
    return totals[False], totals[True], unknown


def _reads(model: Transformer) -> tuple[list[TableRead], tuple[str, ...]]:
    reads: list[TableRead] = []
    unknown: set[str] = set()
    for _, _, plugin in model.plugins():
        if isinstance(plugin, HasReads):
            reads += plugin.reads()
        elif hasattr(plugin, "table_spec") or _has_table(plugin):
            unknown.add(type(plugin).__name__)
    return reads, tuple(sorted(unknown))


def _has_table(plugin: nn.Module) -> bool:
    return any(isinstance(module, ValueTable) for module in plugin.modules())


class _OneTable:
    """One table of a model; `split` is False for a plugin's own table, which every rank holds whole."""

    def __init__(self, table: ValueTable, setting: Setting, *, split: bool) -> None:
        self.setting = setting
        self.shard, self.members = (setting.shard, setting.members) if split else ("none", 1)
        self.replicas = setting.world // self.members
        self.item, self.sum_bytes = setting.table_item, setting.sum_bytes
        self.width = table.dim // table.slices
        self.lines = -(-table.n_lines // self.members) if self.shard == "row" else table.n_lines
        self.columns = -(-self.width // self.members) if self.shard == "dim" else self.width
        self.trained, self.mapped = table.learns, table.is_mapped
        self.learning = setting.learning if split else table.learning
        # In host memory each rank drops reads of other ranks' rows before staging.
        self.on_host = setting.tables_on_host
        if setting.devices_differ:
            self.on_host = setting.on_host or table.stays_on_cpu
        self.own_lines_only = self.shard == "row" and self.on_host

    def figures(self, calls: Sequence[TableRead] | None) -> TableFigures:
        """Returns the figures, given the reads of one forward (None: unknown)."""
        # Rows that stay in a file are no memory of the process.
        part = 0 if self.mapped else self.lines * self.columns * self.item
        dense = self.trained and self.learning == "dense"
        states = 2 * part if dense else self._row_states() if self.trained else 0
        memory = TableFigures(part=part, gradients=part if dense else 0, states=states)
        return memory + self._of_reads(calls, part, dense=dense)

    def _row_states(self) -> int:
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.item]
        weight = torch.empty(self.lines, self.columns, dtype=dtype, device="meta")
        return state_bytes(self.setting.rule, weight)

    def _of_reads(self, calls: Sequence[TableRead] | None, part: int, *, dense: bool) -> TableFigures:
        replicas = 2 * (self.replicas - 1) * part // self.replicas if dense else 0
        if calls is None:
            return TableFigures(
                staged=None, merged=None, forward=None, backward=None, replicas=replicas or None, statistics=None
            )
        batches = self.setting.accumulate
        forwards = 2 if self.setting.checkpointing else 1
        traffic = TableFigures(
            forward=batches * forwards * sum(self._forward(call) for call in calls),
            backward=batches * sum(self._backward(call) for call in calls),
            replicas=replicas,
        )
        if dense or not self.trained:
            return traffic
        return traffic + self._staged_figures([self._staged(call) for call in calls] * batches)

    def _own_reads(self, call: TableRead) -> int:
        assert self.setting.tokens is not None
        return self.setting.tokens * call.reads

    def _outputs(self, call: TableRead) -> int:
        """Returns the bytes of sums, or of the vectors for inner products, received in one direction."""
        if self.shard == "none":
            return 0
        sent = (self.members - 1) * self._own_reads(call) * max(1, call.groups) * self.width * self.item
        return sent // self.members if self.shard == "dim" else sent

    def _forward(self, call: TableRead) -> int:
        if self.shard == "none":
            return 0
        # An int32 id, its weight, and an int32 group.
        per_id = 4 if call.gather else 4 + self.item + (4 if call.groups else 0)
        return (self.members - 1) * self._own_reads(call) * call.ids * per_id + self._outputs(call)

    def _backward(self, call: TableRead) -> int:
        if self.shard == "none":
            return 0
        weights = 0 if call.gather else (self.members - 1) * self._own_reads(call) * call.ids * self.item
        return weights + self._outputs(call)

    def _staged(self, call: TableRead) -> tuple[int, int]:
        """Returns the staged reads and source rows of all members for one call."""
        reads = self.members * self._own_reads(call)
        ids = reads * call.ids
        kept = -(-ids // self.members) if self.own_lines_only else ids
        # A line that is read by itself has a source row of its own.
        return kept, kept if call.gather else reads * max(1, call.groups)

    def _staged_figures(self, staged: list[tuple[int, int]]) -> TableFigures:
        reads, sources = sum(ids for ids, _ in staged), sum(rows for _, rows in staged)
        buffers = _capacity([ids for ids, _ in staged]) * (8 + self.sum_bytes)
        buffers += _capacity([rows for _, rows in staged]) * self.columns * self.item
        exchanged, merged, touched = self._exchange(reads, sources)
        ring = 2 * (self.members - 1) * touched * self.sum_bytes // self.members
        # A rule that needs the squares of whole rows: `dim` leaves each rank only a part of each row.
        rule = self.setting.rule
        statistics = ring if rule.needs_mean_squares and self.shard == "dim" else 0
        # A rule that needs the sums of whole columns: `row` leaves each rank only some of the rows.
        if rule.needs_column_sums and self.shard == "row":
            statistics += 2 * (self.members - 1) * self.columns * self.sum_bytes // self.members
        return TableFigures(staged=buffers, merged=merged, replicas=exchanged, statistics=statistics)

    def _exchange(self, reads: int, sources: int) -> tuple[int, int, int]:
        """Returns bytes received from replicas, bytes to hold what all of them sent, and the merged gradient's rows."""
        rows = self._touched(reads)
        if self.replicas == 1:
            return 0, 0, rows
        received = received_bytes(
            reads, sources, rows, n_rows=self.lines, dim=self.columns, item=self.item, replicas=self.replicas
        )
        # The same choice as `memory.replicas` makes in training.
        scheme = min(received, key=received.__getitem__)
        padded = {"reads": reads, "rows": rows, "dense": self.lines}[scheme]
        merged = reads if self.on_host else padded
        shares = 2 * (self.replicas - 1) if scheme == "dense" else self.replicas - 1
        return received[scheme], received[scheme] * self.replicas // shares, self._touched(merged * self.replicas)

    def _touched(self, reads: int) -> int:
        if not self.on_host:
            # Padded on an accelerator, since the host does not wait for the number of distinct rows.
            return min(reads, self.lines)
        return round(self.lines * -math.expm1(-reads / self.lines))


def _capacity(lengths: list[int]) -> int:
    """Returns the final capacity of a buffer that doubles as those of `RowStage` do, after appending `lengths`."""
    capacity = filled = 0
    for length in lengths:
        filled += length
        if filled > capacity:
            capacity = max(filled, 2 * capacity)
    return capacity
