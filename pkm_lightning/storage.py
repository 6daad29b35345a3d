"""Writes files so that a kill or a loss of power leaves either the earlier content or the new one, and locks them."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pkm_lightning.errors import ConfigError, RunDirectoryError


def flush(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk and would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | Path, mode: str = "r", **options: Any) -> IO[Any]:
    """Opens a file as `open` does, except a pipe, which would wait for its other end, or a device.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return open(path, mode, opener=_regular, **options)


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise OSError(errno.EISDIR, "Is a directory") if stat.S_ISDIR(kind) else OSError(errno.EINVAL, "not a file")
    return descriptor


def hold(lock: IO[str]) -> bool:
    """Locks an open file until it is closed or the process ends; returns False if another process holds the lock."""
    try:
        # A POSIX record lock, which forked data workers do not inherit: they outlive a killed run by seconds.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class HeldFolder:
    """A folder, made if it is missing, whose file `.lock` this process holds until `close`.

    Args:
        path: of the folder.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path / ".lock"
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._is_new = not self._file.exists()
        while True:
            path.mkdir(parents=True, exist_ok=True)
            lock = open_regular(self._file, "a")
            if not hold(lock):
                lock.close()
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            # A command that found nothing to do removes its lock, which this one may have opened before.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), self._file.stat()):
                    self._lock = lock
                    return
            lock.close()

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    def withdraw(self) -> None:
        """Releases the lock, and removes what `__init__` has made unless something else is in there."""
        with contextlib.suppress(OSError):
            if self._is_new:
                self._file.unlink()
            for folder in self._made:
                folder.rmdir()
        self._lock.close()


def is_stream(path: Path) -> bool:
    """Returns whether `path` is a pipe, a device, or where the output of this process goes: not a file to replace."""
    return _output_descriptor(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())


def _output_descriptor(path: Path) -> int | None:
    """Returns 1 or 2 if `path` is the standard output or error of this process, as `/dev/stdout` is."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return next((number for number in (1, 2) if os.path.samestat(status, os.fstat(number))), None)
    return None


def check_target(key: str, path: Path) -> None:
    """Refuses a `path` that could not be written when the work is done; `key` is where it comes from.

    Raises:
        ConfigError: it is a folder, or its own folder is missing or cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{key}={path} is a folder; give the name of a file.")
    folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
    if is_stream(path):
        return
    if not folder.is_dir():
        raise ConfigError(f"{key}={path}: the folder {folder} does not exist; make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: the folder {folder} cannot be written; choose another place.")


@contextlib.contextmanager
def written_beside(path: Path, *, over_folder: bool = False) -> Iterator[IO[bytes]]:
    """Opens `NAME.tmp` for writing, and renames it to `path` when the block ends and the content is on disk.

    An error within the block removes `NAME.tmp` and leaves `path` as it was. A link stays one: what it points to is
    replaced, and keeps its permissions. What goes into a pipe or a device goes there directly.

    Args:
        path: of the file to write.
        over_folder: the file may take the place of a folder.

    Raises:
        OSError: the disk is full, the folder is missing or cannot be written, or `path` is a folder.
    """
    if is_stream(path):
        with _open_stream(path) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + ".tmp")
    try:
        remove_leftover(beside)
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if path.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        (replace if over_folder else os.replace)(beside, path)
        flush(path.parent)  # else a loss of power could undo the renaming
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Makes the folder `NAME.tmp`, and renames it to `path` when the block ends and its files are on disk.

    A folder at `path` is replaced. An error within the block removes `NAME.tmp` and leaves `path` as it was.

    Raises:
        OSError: the disk is full, or the folder that holds `path` is missing or cannot be written.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + ".tmp")
    try:
        remove_leftover(beside)
        beside.mkdir()
        yield beside
        for entry in (*beside.iterdir(), beside):
            flush(entry)
        replace(beside, path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def remove_leftover(beside: Path) -> None:
    """Removes what a killed process has left at `beside`: a file or a folder, whichever is written there now."""
    with contextlib.suppress(OSError):  # writing raises it
        shutil.rmtree(beside) if beside.is_dir() and not beside.is_symlink() else beside.unlink(missing_ok=True)


def _open_stream(path: Path) -> IO[bytes]:
    descriptor = _output_descriptor(path)
    if descriptor is None:
        return path.open("wb")
    # Opened by name, a file that the shell has opened would be overwritten from its beginning.
    sys.stdout.flush()
    return os.fdopen(os.dup(descriptor), "wb")


def write_beside(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` as `written_beside` does.

    Raises:
        RunDirectoryError: the disk is full or the folder cannot be written.
    """
    try:
        with written_beside(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be written ({error.strerror}); free the disk, or choose another place."
        ) from None


def csv_line(values: Iterable[object]) -> str:
    """Returns a line of CSV, ended by a newline."""
    line = io.StringIO(newline="")
    # With a newline as the terminator Python 3.11 would not quote a carriage return, at which readers end the row.
    csv.writer(line, lineterminator="\r\n").writerow(values)
    return line.getvalue().removesuffix("\r\n") + "\n"


def replace(beside: Path, path: Path) -> None:
    """Renames `beside`, a file or a folder, to `path`, which may exist as either.

    Where that takes two renames, a kill between them leaves the earlier content whole under `NAME.old`.
    """
    if not path.exists() or not (path.is_dir() or beside.is_dir()):
        os.replace(beside, path)
        return
    # A folder cannot be renamed over another.
    aside = path.with_name(path.name + ".old")
    _remove(aside)
    os.replace(path, aside)
    os.replace(beside, path)
    _remove(aside)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
