"""Value tables: what a device holds of them, and what their reads and updates send.

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
from pkm_lightning.model.placement import named_plugins
from pkm_lightning.ops.row_update import find_rule, state_bytes

if TYPE_CHECKING:
    from pkm_lightning.capacity.setting import Setting
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class TableFigures:
    """Bytes where the tables lie, and bytes that a device receives in a step; None: unknown."""

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
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            sums[field.name] = None if mine is None or theirs is None else mine + theirs
        return TableFigures(**sums)


def table_figures(model: Transformer, setting: Setting) -> tuple[TableFigures, tuple[str, ...]]:
    """The sum over all tables, and the plugins that do not say how they read theirs."""
    reads, unknown = _reads(model)
    total = TableFigures()
    for table in model.value_tables:
        calls = None if unknown or setting.tokens is None else [read for read in reads if read.table is table]
        total += _OneTable(table, setting, split=any(table is own for own in model.tables)).figures(calls)
    return total, unknown


def _reads(model: Transformer) -> tuple[list[TableRead], tuple[str, ...]]:
    reads: list[TableRead] = []
    unknown: set[str] = set()
    for block in model.blocks:
        for _, plugin in named_plugins(block.ffn):  # type: ignore[arg-type]
            if isinstance(plugin, HasReads):
                reads += plugin.reads()
            elif hasattr(plugin, "table_spec") or _has_table(plugin):
                unknown.add(type(plugin).__name__)
    return reads, tuple(sorted(unknown))


def _has_table(plugin: nn.Module) -> bool:
    return any(isinstance(module, ValueTable) for module in plugin.modules())


class _OneTable:
    """One table; a plugin's own is not split, since only tables of the model know of groups."""

    def __init__(self, table: ValueTable, setting: Setting, *, split: bool) -> None:
        self.setting = setting
        self.shard, self.members = (setting.shard, setting.members) if split else ("none", 1)
        self.replicas = setting.world // self.members
        self.item, self.wide = setting.table_item, setting.wide
        self.width = table.dim // table.slices
        self.lines = -(-table.n_lines // self.members) if self.shard == "row" else table.n_lines
        self.columns = -(-self.width // self.members) if self.shard == "dim" else self.width
        self.trained = table.stage is not None or table.weight.requires_grad
        self.learning = setting.learning if split else table.learning
        self.own_lines_only = self.shard == "row" and setting.tables_on_host

    def figures(self, calls: Sequence[TableRead] | None) -> TableFigures:
        """With the calls of a forward, None where they are unknown."""
        part = self.lines * self.columns * self.item
        dense = self.trained and self.learning == "dense"
        states = 2 * part if dense else self._row_states() if self.trained else 0
        held = TableFigures(part=part, gradients=part if dense else 0, states=states)
        return held + self._of_reads(calls, part, dense=dense)

    def _row_states(self) -> int:
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.item]
        weight = torch.empty(self.lines, self.columns, dtype=dtype, device="meta")
        return state_bytes(find_rule(self.setting.rule), weight)

    def _of_reads(self, calls: Sequence[TableRead] | None, part: int, *, dense: bool) -> TableFigures:
        replicas = 2 * (self.replicas - 1) * part // self.replicas if dense else 0
        if calls is None:
            return TableFigures(
                staged=None, merged=None, forward=None, backward=None, replicas=replicas or None, statistics=None
            )
        batches = self.setting.accumulate
        again = 2 if self.setting.checkpointing else 1
        travelled = TableFigures(
            forward=batches * again * sum(self._forward(call) for call in calls),
            backward=batches * sum(self._backward(call) for call in calls),
            replicas=replicas,
        )
        if dense or not self.trained:
            return travelled
        return travelled + self._staging([self._staged(call) for call in calls] * batches)

    # --- one call

    def _own_reads(self, call: TableRead) -> int:
        assert self.setting.tokens is not None
        return self.setting.tokens * call.reads

    def _outputs(self, call: TableRead) -> int:
        """Sums, or what the inner products are with, on their way in one direction."""
        if self.shard == "none":
            return 0
        sent = (self.members - 1) * self._own_reads(call) * max(1, call.groups) * self.width * self.item
        return sent // self.members if self.shard == "dim" else sent

    def _forward(self, call: TableRead) -> int:
        if self.shard == "none":
            return 0
        per_id = 4 + self.item + (4 if call.groups else 0)
        return (self.members - 1) * self._own_reads(call) * call.ids * per_id + self._outputs(call)

    def _backward(self, call: TableRead) -> int:
        if self.shard == "none":
            return 0
        return (self.members - 1) * self._own_reads(call) * call.ids * self.item + self._outputs(call)

    def _staged(self, call: TableRead) -> tuple[int, int]:
        """Reads and source rows of all members."""
        reads = self.members * self._own_reads(call)
        ids = reads * call.ids
        return (-(-ids // self.members) if self.own_lines_only else ids), reads * max(1, call.groups)

    # --- all calls of a step

    def _staging(self, staged: list[tuple[int, int]]) -> TableFigures:
        reads, sources = sum(ids for ids, _ in staged), sum(rows for _, rows in staged)
        held = _room([ids for ids, _ in staged]) * (8 + self.wide)
        held += _room([rows for _, rows in staged]) * self.columns * self.item
        exchanged, merged, touched = self._exchange(reads, sources)
        ring = 2 * (self.members - 1) * touched * self.wide // self.members
        needs_sums = find_rule(self.setting.rule).needs_mean_squares
        statistics = ring if needs_sums and self.shard == "dim" else 0
        return TableFigures(staged=held, merged=merged, replicas=exchanged, statistics=statistics)

    def _exchange(self, reads: int, sources: int) -> tuple[int, int, int]:
        """Bytes between replicas, bytes that hold what all of them have sent, and rows of the gradient in the end."""
        rows = self._touched(reads)
        if self.replicas == 1:
            return 0, 0, rows
        received = received_bytes(
            reads, sources, rows, n_rows=self.lines, dim=self.columns, item=self.item, replicas=self.replicas
        )
        way = min(received, key=received.__getitem__)
        padded = {"reads": reads, "rows": rows, "dense": self.lines}[way]
        merged = reads if self.setting.tables_on_host else padded
        shares = 2 * (self.replicas - 1) if way == "dense" else self.replicas - 1
        return received[way], received[way] * self.replicas // shares, self._touched(merged * self.replicas)

    def _touched(self, reads: int) -> int:
        if not self.setting.tables_on_host:
            return min(reads, self.lines)
        return round(self.lines * -math.expm1(-reads / self.lines))


def _room(lengths: list[int]) -> int:
    """What a buffer holds that grows as `RowStage`'s do."""
    room = filled = 0
    for length in lengths:
        filled += length
        if filled > room:
            room = max(filled, 2 * room)
    return room
