"""Reads documents in a thread of its own, a bounded number of bytes ahead of the thread that tokenises them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pkm_lightning.data.documents import Piece, Reader

#: Groups that wait to be tokenised.
WAITING = 4
#: Seconds between looks at whether the tokens of a group are still wanted.
LOOK = 0.1


@dataclass(frozen=True)
class Position:
    """A place in the stream of a reader's pieces, from which it can be read again.

    Attributes:
        file: number of the file among those of the reader.
        pieces: of this file that lie before the place.
        skipped: counts of what was left out before the first piece of the file.
    """

    file: int = 0
    pieces: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Group:
    """Consecutive pieces that are tokenised together.

    Attributes:
        pieces: at least one, except in the last group of a reader.
        n_bytes: of their text as UTF-8.
        after: the place behind them.
        skipped: counts of what was left out up to there.
        done: bytes of the reader's files, as they lie on disk, that were read up to there; about.
    """

    pieces: list[Piece] = field(default_factory=list)
    n_bytes: int = 0
    after: Position = field(default_factory=Position)
    skipped: Mapping[str, int] = field(default_factory=dict)
    done: int = 0


def read_ahead(reader: Reader, start: Position, group_bytes: int) -> Iterator[Group]:
    """Yields the pieces behind `start` in groups of at least `group_bytes`, then a group without pieces.

    The groups depend on the pieces and on `start` alone: a build that resumes between two groups meets the same ones.
    Close the iterator to end its thread.
    """
    groups: queue.Queue[Group | BaseException] = queue.Queue(WAITING)
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(reader, start, group_bytes, groups, stop), daemon=True)
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


def _read(
    reader: Reader,
    start: Position,
    group_bytes: int,
    groups: queue.Queue[Group | BaseException],
    stop: threading.Event,
) -> None:
    try:
        for group in _groups(reader, start, group_bytes):
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


def _groups(reader: Reader, start: Position, group_bytes: int) -> Iterator[Group]:
    before_file = [0, *accumulate(file_sizes(reader))]
    position, group, in_file = start, Group(after=start), 0
    number, file = 0, -1
    # What was counted before `start` is known; what is read again up to there would be counted twice.
    known: dict[str, int] = {}
    for piece in reader.pieces(start.file):
        if piece.file != file:
            file, number, in_file = piece.file, 0, 0
            if file == start.file and start.pieces:
                known = _difference(start.skipped, _skipped(reader))
            position = Position(file, 0, _sum(known, _skipped(reader)))
        number += 1
        if file == start.file and number <= start.pieces:
            continue
        n_bytes = sum(len(segment.text.encode()) for segment in piece.segments)
        in_file += n_bytes
        group.pieces.append(piece)
        group.n_bytes += n_bytes
        if group.n_bytes >= group_bytes:
            group.after = Position(file, number, position.skipped)
            group.skipped = _sum(known, _skipped(reader))
            consumed = getattr(reader, "consumed", in_file)
            group.done = before_file[file] + min(consumed, before_file[file + 1] - before_file[file])
            yield group
            group = Group(after=group.after)
    end = Position(file, number, position.skipped) if file >= 0 else start
    skipped = _sum(known, _skipped(reader))
    if group.pieces:
        group.after, group.skipped, group.done = end, skipped, before_file[-1]
        yield group
    yield Group(after=end, skipped=skipped, done=before_file[-1])


def file_sizes(reader: Reader) -> list[int]:
    """Returns the bytes of each file of a reader; 0 for what is no file."""
    return [file.stat().st_size if file.is_file() else 0 for file in reader.files]


def _skipped(reader: Reader) -> dict[str, int]:
    return dict(getattr(reader, "skipped", {}))


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    total = {reason: one.get(reason, 0) + other.get(reason, 0) for reason in {**one, **other}}
    return {reason: count for reason, count in sorted(total.items()) if count}


def _difference(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return _sum(one, {reason: -count for reason, count in other.items()})
