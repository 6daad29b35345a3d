"""Seconds that numba took to compile kernels in this process, which clocks of training leave out.

A kernel is compiled once per machine: the first run after an installation takes ten seconds or more for it, which is
no property of the model. The clock stands still where numba is not installed or has its kernels from its cache.
"""

from __future__ import annotations

import time

_total = _began = 0.0
# Compiling a kernel compiles those that it calls, within it. numba compiles in one thread at a time.
_depth = 0


def begin() -> None:
    """Records that a kernel starts to be compiled."""
    global _began, _depth
    if _depth == 0:
        _began = time.perf_counter()
    _depth += 1


def end() -> None:
    """Records that it has been compiled, or has failed to."""
    global _total, _depth
    _depth -= 1
    if _depth == 0:
        _total += time.perf_counter() - _began


def compile_seconds() -> float:
    """Returns the seconds so far."""
    return _total + (time.perf_counter() - _began if _depth else 0.0)
