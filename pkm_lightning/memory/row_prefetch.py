"""Rows of the next micro-batch, read by a thread while the present one is computed.

Where the ids of a table's reads follow from tokens alone, they are known as soon as the tokens are. The rows of each
read are copied once each, in ascending order, into a small table beside the model; the forward then reads that table
instead of a file or of host memory. A read is recognised by its ids: one of other ids, or of rows that have changed in
a way that is not known, is made as without prefetch.

Letters: T tokens, K lines per read, U lines that are read, V values per line.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Int

    from pkm_lightning.memory.stored_rows import StoredRows

#: Micro-batches of one loader that are kept: the one that is computed, and the next.
_KEPT = 2
#: Updates of a table between the prefetch of rows and their use, of which the rows are remembered.
_UPDATES = 4


class ReadTable(nn.Module):
    """What is read of a `ValueTable`, which imports this module.

    It is a base class and no Protocol: from Python 3.12 on, `isinstance` sees no parameter of a module as a member.
    """

    weight: nn.Parameter
    is_mapped: bool
    stored: StoredRows | None
    prefetcher: RowPrefetcher | None

    @property
    def is_streamed(self) -> bool:
        """Whether every read takes its lines from a file, in which they stay."""
        return self.is_mapped and self.stored is not None


#: Reads of one micro-batch: the table and the ids, (T, K) each, in any order.
Reads = Sequence[tuple[ReadTable, Tensor]]


@dataclass
class CompactRead:
    """The lines of one read.

    Attributes:
        ids_TK: the ids of the read, on the model's device.
        lines_U: the same ids, each once and in ascending order, on the CPU.
        local_TK: places of the ids in `lines_U`, on the model's device.
        rows_UV: the lines, on the model's device and in the table's dtype.
        version: of the table's weight when its lines were read.
        ready: an event of the GPU after which the lines are there; None on the CPU.
    """

    ids_TK: Tensor
    lines_U: Tensor
    local_TK: Tensor
    rows_UV: Tensor
    version: int = 0
    ready: torch.cuda.Event | None = None


def read_compactly(table: ReadTable, ids_TK: Int[Tensor, "T K"], device: torch.device) -> CompactRead:
    """Reads the lines of `ids` from the file or host memory of a table.

    Raises:
        ValueError: an id is out of range.
        CheckpointError: the file cannot be read.
    """
    version = table.weight._version
    lines_U, local_TK = torch.unique(ids_TK.cpu().long(), return_inverse=True)
    pinned = device.type == "cuda"
    if table.is_streamed:
        assert table.stored is not None
        rows_UV = table.stored.read(lines_U, pinned=pinned)
    else:
        empty_UV = torch.empty(len(lines_U), table.weight.shape[1], dtype=table.weight.dtype, pin_memory=pinned)
        rows_UV = torch.index_select(table.weight.detach(), 0, lines_U, out=empty_UV)
    # Cast after the copy: a GPU receives the bytes of the file.
    rows_UV = rows_UV.to(device, non_blocking=True).to(table.weight.dtype)
    return CompactRead(ids_TK.to(device), lines_U, local_TK.to(device, non_blocking=True), rows_UV, version)


class RowPrefetcher:
    """The prefetched reads of all tables of a model. Its thread lives as long as a loader is iterated over.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: dict[object, collections.deque[Future[dict[ReadTable, list[CompactRead]]]]] = {}
        self._over: set[object] = set()
        self._updates: dict[ReadTable, collections.deque[tuple[int, int, Tensor]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, source: object, tables: Sequence[ReadTable], reads: Callable[[], Reads]) -> None:
        """Starts the reads of the next micro-batch.

        Args:
            source: the iteration that the micro-batch is of; its last two are kept.
            tables: those that are prefetched.
            reads: called on the thread.

        Raises:
            Exception: what an earlier micro-batch that is dropped now has raised on the thread.
        """
        self._drop()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="table-prefetch")
        for table in tables:
            table.prefetcher = self
            self._updates.setdefault(table, collections.deque(maxlen=_UPDATES))
        # To the end: reads are looked for in the latest iteration first.
        batches = self._batches[source] = self._batches.pop(source, collections.deque())
        batches.append(self._pool.submit(self._read, tuple(tables), reads))
        while len(batches) > _KEPT:
            batches.popleft().result()

    def end(self, source: object, *, keep: bool = False) -> None:
        """Ends an iteration, and with the last one the thread.

        Args:
            source: the iteration.
            keep: keeps what was prefetched until another micro-batch is submitted: the last one is not computed yet.
        """
        if source not in self._batches:
            return
        self._over.add(source)
        if not keep:
            self._drop()
        if self._over >= self._batches.keys() and self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        if not self._batches:
            for table in self._updates:
                table.prefetcher = None
            self._updates.clear()

    def _drop(self) -> None:
        """Drops the micro-batches of iterations that are over."""
        for source in self._over:
            for batch in self._batches.pop(source):
                batch.cancel()
        self._over.clear()

    def find(self, table: ReadTable, ids_TK: Int[Tensor, "T K"]) -> CompactRead | None:
        """Returns the prefetched read of these ids, with the present lines of the table; None if there is none.

        Raises:
            Exception: what its thread has raised.
        """
        for batches in reversed(self._batches.values()):
            # The oldest is the present micro-batch, or the next to last of a loader that is exhausted.
            for batch in batches:
                for read in batch.result().get(table, ()):
                    self._await(read)
                    if read.ids_TK.shape == ids_TK.shape and torch.equal(read.ids_TK.to(ids_TK.dtype), ids_TK):
                        return self._present(table, read)
        return None

    def record_update(self, table: ReadTable, before: int, rows_U: Int[Tensor, " U"]) -> None:
        """Records an update that has changed no other lines than these; `before` is the weight's version before it."""
        if table in self._updates:
            self._updates[table].append((before, table.weight._version, rows_U.long()))

    def _await(self, read: CompactRead) -> None:
        """Makes the GPU's present work wait for the copies of a read; the host goes on."""
        if read.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(read.ready)
            for tensor in (read.ids_TK, read.local_TK, read.rows_UV):
                tensor.record_stream(current)
            read.ready = None

    def _present(self, table: ReadTable, read: CompactRead) -> CompactRead | None:
        """Returns the read with the present lines of the table; None if it is not known which have changed."""
        changed = self._changed(table, read.version)
        if changed is None:
            return None
        for lines_M in changed:
            place_M = torch.searchsorted(read.lines_U, lines_M).clamp(max=len(read.lines_U) - 1)
            is_read_M = read.lines_U[place_M] == lines_M
            present_MV = table.weight.detach()[lines_M[is_read_M]].to(read.rows_UV)
            # Not in place: an earlier read of these rows may wait for its backward pass.
            read.rows_UV = read.rows_UV.index_copy(0, place_M[is_read_M].to(self._device), present_MV)
        read.version = table.weight._version
        return read

    def _changed(self, table: ReadTable, version: int) -> list[Tensor] | None:
        """Returns the lines of the updates since `version` of the weight; None if something else has changed it."""
        changed = []
        for before, after, rows_U in self._updates.get(table, ()):
            if before == version:
                changed.append(rows_U)
                version = after
        return changed if version == table.weight._version else None

    @torch.no_grad()
    def _read(self, tables: tuple[ReadTable, ...], reads: Callable[[], Reads]) -> dict[ReadTable, list[CompactRead]]:
        compact: dict[ReadTable, list[CompactRead]] = {}
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for table, ids_TK in reads():
                if table in tables:
                    compact.setdefault(table, []).append(read_compactly(table, ids_TK, self._device))
            if self._stream is not None:
                ready = torch.cuda.Event()
                ready.record(self._stream)
                for read in (read for of_table in compact.values() for read in of_table):
                    read.ready = ready
        return compact

    def __deepcopy__(self, memo: dict[int, Any]) -> RowPrefetcher:
        # A copied table is another key: it finds nothing here, and reads as without prefetch.
        return self
