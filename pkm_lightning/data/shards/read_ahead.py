"""Reads documents in a thread of its own, a bounded number of bytes ahead of the thread that tokenises them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pkm_lightning.data.documents import Piece, Reader

#: Groups that wait to be tokenised.
WAITING = 2
#: Seconds between looks at whether the tokens of a group are still wanted.
LOOK = 0.1


@dataclass(frozen=True)
class Position:
    """A place in the stream of a reader's pieces, from which it can be read again.

    Attributes:
        file: number of the file among those of the reader.
        pieces: of this file that lie before the place.
        skipped: counts of what the reader has left out before it.
    """

    file: int = 0
    pieces: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Group:
    """Consecutive pieces that are tokenised together.

    Attributes:
        pieces: in their order; none in the last group of a reader.
        n_bytes: of their text as UTF-8.
        done: bytes of the reader's files, as they lie on disk, that were read up to there; about.
        after: the place behind them, where a shard ends there or the reader does.
    """

    pieces: list[Piece] = field(default_factory=list)
    n_bytes: int = 0
    done: int = 0
    after: Position | None = None


def read_ahead(reader: Reader, start: Position, *, group_bytes: int, shard_bytes: int) -> Generator[Group, None, None]:
    """Yields the pieces behind `start` in groups, then a group without pieces.

    A group has at least `group_bytes` and ends with a document, unless that makes it twice as large. A shard ends with
    the group that fills it. Both depend on the pieces and on `start` alone: a build that resumes behind a shard meets
    the same groups. Close the iterator to end its thread.
    """
    groups: queue.Queue[Group | BaseException] = queue.Queue(WAITING)
    stop = threading.Event()
    source = _groups(reader, start, group_bytes, shard_bytes)
    thread = threading.Thread(target=_read, args=(source, groups, stop), daemon=True)
    thread.start()
    try:
        while True:
            group = groups.get()
            if isinstance(group, BaseException):
                raise group
            yield group
            if not group.pieces:
                return
    finally:
        stop.set()
        thread.join()


def _read(source: Iterator[Group], groups: queue.Queue[Group | BaseException], stop: threading.Event) -> None:
    try:
        for group in source:
            if not _put(group, groups, stop):
                return
    except BaseException as error:
        _put(error, groups, stop)


def _put(item: Any, groups: queue.Queue[Any], stop: threading.Event) -> bool:
    """Returns whether `item` went into the queue before `stop` was set."""
    while not stop.is_set():
        try:
            groups.put(item, timeout=LOOK)
            return True
        except queue.Full:
            pass
    return False


def _groups(reader: Reader, start: Position, group_bytes: int, shard_bytes: int) -> Iterator[Group]:
    before_file = [0, *accumulate(file_sizes(reader))]
    group, in_shard = Group(), 0
    file, number, in_file = start.file, 0, 0
    # What was left out before `start` is known; what is read again up to there would be counted twice.
    known: Mapping[str, int] = {}
    for piece in reader.pieces(start.file):
        if piece.file != file:
            file, number, in_file = piece.file, 0, 0
        n_bytes = sum(len(segment.text.encode()) for segment in piece.segments)
        number, in_file = number + 1, in_file + n_bytes
        if file == start.file and number <= start.pieces:
            if number == start.pieces:
                known = {reason: n - _skipped(reader).get(reason, 0) for reason, n in start.skipped.items()}
            continue
        group.pieces.append(piece)
        group.n_bytes += n_bytes
        if group.n_bytes >= group_bytes and (piece.ends or group.n_bytes >= 2 * group_bytes):
            in_shard += group.n_bytes
            if in_shard >= shard_bytes:
                group.after, in_shard = Position(file, number, _sum(known, _skipped(reader))), 0
            consumed = getattr(reader, "consumed", in_file)
            group.done = before_file[file] + min(consumed, before_file[file + 1] - before_file[file])
            yield group
            group = Group()
    if group.pieces:
        group.done = before_file[-1]
        yield group
    yield Group(done=before_file[-1], after=Position(file, number, _sum(known, _skipped(reader))))


def file_sizes(reader: Reader) -> list[int]:
    """Returns the bytes of each file of a reader; 0 for what is no file."""
    return [file.stat().st_size if file.is_file() else 0 for file in reader.files]


def _skipped(reader: Reader) -> dict[str, int]:
    return dict(getattr(reader, "skipped", {}))


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    total = {reason: one.get(reason, 0) + other.get(reason, 0) for reason in {**one, **other}}
    return {reason: count for reason, count in sorted(total.items()) if count}
