"""Lets one process at a time compile a Numba kernel, so that the others load what it has written.

Numba keeps compiled kernels on disk, but processes that start together all miss them: 10 s of CPU each.
"""

from __future__ import annotations

import fcntl
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba.core.dispatcher import Dispatcher

_depth = 0


@contextmanager
def _alone() -> Iterator[None]:
    """Holds a lock of all processes of this machine; a kernel compiles the kernels that it calls within it."""
    global _depth
    _depth += 1
    try:
        if _depth > 1:
            yield
            return
        with (Path(tempfile.gettempdir()) / "pkm-lightning-tests-compile.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        _depth -= 1


def compile_in_turn() -> None:
    """Replaces Numba's `compile`, which looks on disk first, by one that waits for its turn."""
    compile_or_load = Dispatcher.compile

    @functools.wraps(compile_or_load)
    def in_turn(self: Dispatcher, signature: Any) -> Any:
        with _alone():
            return compile_or_load(self, signature)

    Dispatcher.compile = in_turn
