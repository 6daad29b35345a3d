"""Rows of the next micro-batch, read by a thread while the present one is computed.

Where the ids of a table's reads follow from tokens alone, they are known as soon as the tokens are. The rows of each
read are copied once each, in ascending order, into a small table beside the model; the forward then reads that table
instead of a file or of host memory. A read is recognised by its ids: one of other ids, or of rows that have changed in
a way that is not known, is made as without prefetch.

Ids on a GPU are not compared where that can be avoided, because the host would have to wait for the forward. The thread
has computed ids from a copy of the tokens on the host; once the loop has moved a micro-batch with these very tokens to
the device, the prefetcher knows it by its memory, and gives a plugin that asks for them (`ids_ahead`) the ids of the
thread. A read with that tensor needs no comparison, since its rows were read for it. Whatever else is read is compared.

Letters: T tokens, K lines per read, U lines that are read, V values per line.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.memory.masked_reads import MaskableReads

if TYPE_CHECKING:
    from jaxtyping import Int

    from pkm_lightning.memory.stored_rows import StoredRows

#: Micro-batches of one loader that are kept: the one that is computed, and the next.
_KEPT = 2
#: Updates of a table between the prefetch of rows and their use, of which the rows are remembered.
_UPDATES = 4


class ReadTable(MaskableReads):
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
#: What the ids of a micro-batch follow from: token ids, and the other fields of a batch, None where it has none.
Tokens = tuple[Tensor | None, ...]


class _Unchanged:
    """A tensor that is recognised by its memory, for as long as nothing has been written to it.

    Its version counts writes, but none through `.data`, NumPy or a kernel that torch does not know.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    def holds(self) -> bool:
        """Returns whether nothing has been written since."""
        return self.tensor._version == self._version

    def is_(self, other: Tensor) -> bool:
        """Returns whether `other` is this tensor, or a view of all of it in its shape, without a look at its values."""
        return other.dtype == self.tensor.dtype and self.tensor.is_set_to(other) and self.holds()


@dataclass
class CompactRead:
    """The lines of one read.

    Attributes:
        host_TK: the ids of the read, on the CPU.
        lines_U: the same ids, each once and in ascending order, on the CPU.
        local_TK: places of the ids in `lines_U`, on the model's device.
        rows_UV: the lines, on the model's device and in the table's dtype.
        version: of the table's weight when its lines were read.
        ids: the ids (T, K) on the model's device, of a read that was made ahead.
        reader: whose read that is.
        ready: an event of the GPU after which the lines are there; None on the CPU.
    """

    host_TK: Tensor
    lines_U: Tensor
    local_TK: Tensor
    rows_UV: Tensor
    version: int = 0
    ids: _Unchanged | None = None
    reader: object = None
    ready: torch.cuda.Event | None = None


def read_compactly(table: ReadTable, ids_TK: Int[Tensor, "T K"], device: torch.device) -> CompactRead:
    """Reads the lines of `ids` from the file or host memory of a table.

    Raises:
        ValueError: an id is out of range.
        CheckpointError: the file cannot be read.
    """
    version = table.weight._version
    host_TK = ids_TK.cpu()
    lines_U, local_TK = torch.unique(host_TK.long(), return_inverse=True)
    pinned = device.type == "cuda"
    if table.is_streamed:
        assert table.stored is not None
        rows_UV = table.stored.read(lines_U, pinned=pinned)
    else:
        empty_UV = torch.empty(len(lines_U), table.weight.shape[1], dtype=table.weight.dtype, pin_memory=pinned)
        rows_UV = torch.index_select(table.weight.detach(), 0, lines_U, out=empty_UV)
    # Cast after the copy: a GPU receives the bytes of the file.
    rows_UV = rows_UV.to(device, non_blocking=True).to(table.weight.dtype)
    return CompactRead(host_TK, lines_U, local_TK.to(device, non_blocking=True), rows_UV, version)


@dataclass
class _MicroBatch:
    """A micro-batch whose rows are read: its tokens on the host, and on the device once they are there."""

    tokens: Tokens
    reads: Future[dict[ReadTable, list[CompactRead]]]
    moved: tuple[_Unchanged | None, ...] | None = None

    def is_of(self, tokens: Tokens) -> bool:
        """Returns whether these are its tokens on the device, by their memory."""
        if self.moved is None:
            return False
        pairs = zip(self.moved, tokens, strict=True)
        if not all(other is None if mine is None else other is not None and mine.is_(other) for mine, other in pairs):
            return False
        # What no version counts is seen by comparison, where the host need not wait for it.
        return any(other is not None and other.device.type != "cpu" for other in tokens) or _equal(self.tokens, tokens)

    def reads_so_far(self) -> dict[ReadTable, list[CompactRead]]:
        """Returns its reads, none while they are under way or if they have failed."""
        is_made = self.reads.done() and not self.reads.cancelled() and self.reads.exception() is None
        return self.reads.result() if is_made else {}


class RowPrefetcher:
    """The prefetched reads of all tables of a model. Its thread lives as long as a loader is iterated over.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: dict[object, collections.deque[_MicroBatch]] = {}
        self._over: set[object] = set()
        self._updates: dict[ReadTable, collections.deque[tuple[int, int, Tensor]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(
        self,
        source: object,
        tables: Sequence[ReadTable],
        reads: Callable[[], Mapping[object, Reads]],
        tokens: Tokens,
    ) -> None:
        """Starts the reads of the next micro-batch.

        Args:
            source: the iteration that the micro-batch is of; its last two are kept.
            tables: those that are prefetched.
            reads: called on the thread; returns the reads of each reader.
            tokens: what the ids follow from, on the host; nobody else writes to these tensors.

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
        batches.append(_MicroBatch(tokens, self._pool.submit(self._read, tuple(tables), reads)))
        while len(batches) > _KEPT:
            batches.popleft().reads.result()

    def follow(self, tokens: Tokens, moved: Tokens) -> None:
        """Records that a micro-batch of these tokens, on the host, is now `moved`; one that is not known is left out.

        Args:
            tokens: those that were moved.
            moved: the same values on the device.
        """
        # Nothing counts what is written to a tensor of inference mode.
        if any(tensor is not None and tensor.is_inference() for tensor in moved):
            return
        for batch in self._kept():
            if batch.moved is None and _equal(batch.tokens, tokens):
                batch.moved = tuple(None if tensor is None else _Unchanged(tensor) for tensor in moved)
                return

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
                batch.reads.cancel()
        self._over.clear()

    def _kept(self) -> Iterator[_MicroBatch]:
        """Yields the micro-batches of the latest iteration first, and of each the oldest first.

        That is the present one, or the next to last of a loader that is exhausted.
        """
        for batches in reversed(self._batches.values()):
            yield from batches

    @torch.compiler.disable
    def ids_ahead(self, table: ReadTable, reader: object, tokens: Tokens) -> list[Tensor] | None:
        """Returns the ids of the reads of a table that `reader` makes for these tokens, in their order.

        None if they were not computed ahead, or `tokens` are not those of a micro-batch that was moved to the device.

        Raises:
            Exception: what its thread has raised.
        """
        for batch in self._kept():
            if batch.is_of(tokens):
                reads = [read for read in batch.reads.result().get(table, ()) if read.reader is reader]
                return [ids.tensor for ids in (self._awaited(read).ids for read in reads) if ids is not None] or None
        return None

    def find(self, table: ReadTable, ids_TK: Int[Tensor, "T K"]) -> CompactRead | None:
        """Returns the prefetched read of these ids, with the present lines of the table; None if there is none.

        Raises:
            Exception: what its thread has raised.
        """
        # The tensors of `ids_ahead` are of reads that are done: the next micro-batch, which may not be, is not awaited.
        for batch in self._kept():
            for read in batch.reads_so_far().get(table, ()):
                if _is_same(read, ids_TK):
                    return self._present(table, self._awaited(read))
        for batch in self._kept():
            for read in batch.reads.result().get(table, ()):
                if _has_same_values(self._awaited(read), ids_TK):
                    return self._present(table, read)
        return None

    def record_update(self, table: ReadTable, before: int, rows_U: Int[Tensor, " U"]) -> None:
        """Records an update that has changed no other lines than these; `before` is the weight's version before it."""
        if table in self._updates:
            self._updates[table].append((before, table.weight._version, rows_U.long()))

    def _awaited(self, read: CompactRead) -> CompactRead:
        """Returns a read whose copies the GPU's present work waits for; the host goes on."""
        if read.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(read.ready)
            for tensor in (read.ids.tensor, read.local_TK, read.rows_UV) if read.ids is not None else ():
                tensor.record_stream(current)
            read.ready = None
        return read

    def _present(self, table: ReadTable, read: CompactRead) -> CompactRead | None:
        """Returns the read with the present lines of the table; None if it is not known which have changed."""
        changed = self._changed(table, read.version)
        if changed is None:
            return None
        for lines_M in changed:
            place_M = torch.searchsorted(read.lines_U, lines_M).clamp(max=len(read.lines_U) - 1)
            is_read_M = read.lines_U[place_M] == lines_M
            present_MV = table.weight.detach()[lines_M[is_read_M]]
            # Not in place: an earlier read of these rows may wait for its backward pass.
            read.rows_UV = read.rows_UV.index_copy(0, self._moved(place_M[is_read_M]), self._moved(present_MV))
        read.version = table.weight._version
        return read

    def _moved(self, value: Tensor) -> Tensor:
        """Returns a tensor of the host on the model's device, without waiting for the copy."""
        if self._device.type != "cuda":
            return value.to(self._device)
        return value.pin_memory().to(self._device, non_blocking=True)

    def _changed(self, table: ReadTable, version: int) -> list[Tensor] | None:
        """Returns the lines of the updates since `version` of the weight; None if something else has changed it."""
        changed = []
        for before, after, rows_U in self._updates.get(table, ()):
            if before == version:
                changed.append(rows_U)
                version = after
        return changed if version == table.weight._version else None

    @torch.no_grad()
    def _read(
        self, tables: tuple[ReadTable, ...], reads: Callable[[], Mapping[object, Reads]]
    ) -> dict[ReadTable, list[CompactRead]]:
        compact: dict[ReadTable, list[CompactRead]] = {}
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for reader, of_reader in reads().items():
                for table, ids_TK in of_reader:
                    if table in tables:
                        read = read_compactly(table, ids_TK, self._device)
                        read.reader, read.ids = reader, _Unchanged(ids_TK.to(self._device))
                        compact.setdefault(table, []).append(read)
            if self._stream is not None:
                ready = torch.cuda.Event()
                ready.record(self._stream)
                for read in (read for of_table in compact.values() for read in of_table):
                    read.ready = ready
        return compact

    def __deepcopy__(self, memo: dict[int, Any]) -> RowPrefetcher:
        # A copied table is another key: it finds nothing here, and reads as without prefetch.
        return self


def _equal(one: Tokens, other: Tokens) -> bool:
    pairs = zip(one, other, strict=True)
    return all(its is None if mine is None else its is not None and torch.equal(mine, its) for mine, its in pairs)


def _is_same(read: CompactRead, ids_TK: Tensor) -> bool:
    return read.ids is not None and read.ids.is_(ids_TK)


def _has_same_values(read: CompactRead, ids_TK: Tensor) -> bool:
    # What was written to since may have the values of `ids_TK`, which are then not those of the rows.
    if read.ids is None or not read.ids.holds() or read.host_TK.shape != ids_TK.shape:
        return False
    return torch.equal(read.ids.tensor.to(ids_TK.dtype), ids_TK)
