"""What every part that writes files must get right."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from pkm_lightning.errors import RunDirectoryError


def flush(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on disk and would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(lock: IO[str]) -> bool:
    """Locks an open file until it is closed or the process ends; False if another process has it.

    A POSIX record lock, which forked data workers do not inherit: they outlive a killed run by seconds.
    """
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_beside(path: Path, content: str | bytes) -> None:
    """Writes `content` to a file beside `path`, flushes it to disk and renames it.

    Raises:
        RunDirectoryError: the disk is full or the place cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be written ({error.strerror}); make room there, or choose another place."
        ) from None
