"""The rows that were read of each set of tables in a forward, as ids by sequence; `usage.slot_readers` names the sets.

A row of a set is one slot of each of its tables. Padding and what is no slot have the id N.

Letters: S sequences, X reads per sequence by all its tokens and heads, M = N + 1 counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pkm_lightning.usage.slot_readers import HasPlugins, Reader, TableSet, find_readers, find_tables

if TYPE_CHECKING:
    from torch import Tensor

    from pkm_lightning.model import Traces

#: Ids (S, X) of each reader of a set, by the name of the set.
RowIds = Mapping[str, Sequence["Tensor"]]


class RowReads:
    """The readers of a model's tables.

    Args:
        model: whose plugins read; its weights are not needed.
        learning: leaves out sets none of whose tables learns by rows.
        max_rows: leaves out sets of more rows; None: none.

    Attributes:
        sets: sets of tables by name.
    """

    def __init__(self, model: HasPlugins, *, learning: bool = False, max_rows: int | None = None) -> None:
        readers = find_readers(model)
        self.sets: dict[str, TableSet] = {
            name: tables
            for name, tables in find_tables(readers).items()
            if (not learning or any(table.stage is not None for table in tables.tables))
            and (max_rows is None or tables.tables[0].rows <= max_rows)
        }
        self._readers = {name: [readers[reader] for reader in tables.readers] for name, tables in self.sets.items()}

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each set."""
        return {name: tables.tables[0].rows for name, tables in self.sets.items()}

    def of_traces(self, traces: Traces, batch: dict[str, Tensor]) -> RowIds:
        """Returns the ids that a micro-batch of `input_ids` (S, T) has read.

        Raises:
            ConfigError: a trace of other shapes than its plugin declares.
        """
        return self._ids(traces, batch, len(batch["input_ids"]))

    def of_layer(self, layer: int, trace: dict[str, Tensor], batch: dict[str, Tensor], sequences: int) -> RowIds:
        """Returns the ids that the forward of one layer has read; see `usage.layer_reads`."""
        return self._ids({layer: trace}, batch, sequences)

    def _ids(self, traces: Traces, batch: dict[str, Tensor], sequences: int) -> RowIds:
        return {
            name: [
                ids
                for reader in readers
                if reader.layer in traces
                and (ids := _ids(reader, traces, batch, sequences, self.rows[name])) is not None
            ]
            for name, readers in self._readers.items()
        }


def _ids(reader: Reader, traces: Traces, batch: dict[str, Tensor], sequences: int, rows: int) -> Tensor | None:
    reads = reader.reads(traces, batch)
    if reads is None:
        return None
    ids_TX = reads.ids_THK.flatten(1).long()
    is_row_TX = (ids_TX >= 0) & (ids_TX < rows)
    if reads.valid_T is not None:
        is_row_TX &= reads.valid_T.unsqueeze(-1)
    return torch.where(is_row_TX, ids_TX, rows).view(sequences, -1)


def count_into(counts_M: Tensor, ids_X: Tensor) -> None:
    """Adds 1 to the counter of each id, in place; the last counter is for what is no row."""
    counts_M.scatter_add_(0, ids_X.flatten(), counts_M.new_ones(()).expand(ids_X.numel()))
