"""The lock under which one process builds a cache folder; the others wait, and say for whom."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from pkm_lightning.data.heartbeat import Heartbeat

#: Seconds without a word: most waits are shorter.
SILENT = 2.0

log = logging.getLogger(__name__)


@contextmanager
def cache_lock(path: Path, *, waits: bool = True) -> Iterator[None]:
    """Holds the lock file `path` within the block; a signal ends the waiting for it.

    Args:
        path: of the file.
        waits: whether a lock that another process holds is waited for.

    Raises:
        OSError: the file cannot be made, or its file system has no locks; or it is held, and not waited for.
    """
    # Not "w", which would erase who holds it.
    with path.open("a+") as file:
        if waits:
            _acquire(file, path)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        file.truncate()
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now}, file)
        file.flush()
        yield


def _acquire(file: IO[str], path: Path) -> None:
    heartbeat = Heartbeat(first=SILENT)
    while True:
        try:
            # Asked again and again: a blocking call could say nothing while it waits.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
        if heartbeat.is_due():
            log.warning("waits for %s (%s)", _holder(file), path)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        pid, host, since = holder["pid"], holder["host"], holder["since"]
    except (ValueError, KeyError, TypeError):
        return "another process, which prepares the same data"
    shown = f"process {pid} on {host}, which has prepared the same data since {since}"
    if host == socket.gethostname() and _suspended(pid):
        return f"{shown} and is suspended: kill -CONT {pid} lets it go on"
    return shown


def _suspended(pid: int) -> bool:
    """Returns whether a process of this machine is stopped; False where there is no /proc."""
    try:
        # After the name in brackets, which may hold spaces and brackets itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
