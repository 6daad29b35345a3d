"""Seconds that numba took to compile kernels in this process, which clocks of training leave out.

A kernel is compiled once per machine: the first run after an installation takes ten seconds or more for it, which is
no property of the model. The clock stands still where numba is not installed or has its kernels from its cache.
"""

from __future__ import annotations

import time

# Of the clock and of the processors: beside other work the first are more.
_total = _began = (0.0, 0.0)
# Compiling a kernel compiles those that it calls, within it. numba compiles in one thread at a time.
_depth = 0


def begin() -> None:
    """Records that a kernel starts to be compiled."""
    global _began, _depth
    if _depth == 0:
        _began = _now()
    _depth += 1


def end() -> None:
    """Records that it has been compiled, or has failed to."""
    global _total, _depth
    _depth -= 1
    if _depth == 0:
        _total = _with_passed()


def compile_seconds() -> float:
    """Returns the seconds of the clock so far."""
    return (_with_passed() if _depth else _total)[0]


def compile_processor_seconds() -> float:
    """Returns the seconds of the processors so far, of all threads of this process."""
    return (_with_passed() if _depth else _total)[1]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _with_passed() -> tuple[float, float]:
    (seconds, processor), (began, processor_began) = _now(), _began
    return _total[0] + seconds - began, _total[1] + processor - processor_began
