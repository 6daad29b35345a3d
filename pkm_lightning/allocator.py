"""How the C library keeps memory that was freed: a training step allocates the same tensors as the step before it.

By default glibc returns freed memory at the end of its heap to the system, and maps and unmaps large blocks one by one;
each page that is touched anew costs a fault and is cleared. A step of the default model takes thousands of faults, up
to a fifth of its CPU time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes from which a block is mapped on its own, and returned as soon as it is freed: tables and logits of large
#: models. The most that glibc itself raises it to, and before 2.35 the most that it takes.
_MAPPED = 32 * 2**20
#: Freed bytes at the end of the heap from which they are returned.
_TRIMMED = 2**30
#: Variables by which users set the same things.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Sets glibc to keep up to 1 GiB of freed blocks below 32 MiB for the next step; returns whether it does.

    The peak of memory stays as it is, as far as blocks of one step fit where those of the last one were. Nothing
    happens with other C libraries, or where `environment` sets glibc's thresholds. Both settings are needed: setting
    one stops glibc from adapting the other. They hold for the whole process, so importing the package must not change
    them: a Trainer that starts on CPUs does.
    """
    if any(name in environment for name in _SETTINGS) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every system
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            mallopt = ctypes.CDLL(None).mallopt
            return all([mallopt(_MMAP_THRESHOLD, _MAPPED), mallopt(_TRIM_THRESHOLD, _TRIMMED)])
    return False
