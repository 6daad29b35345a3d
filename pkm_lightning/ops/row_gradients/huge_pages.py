"""Fresh memory for large results on the CPU, in huge pages where Linux has them.

A gradient of hundreds of megabytes is new memory in every step, and the first touch of its 4 KiB pages takes several
times as long as the sums themselves. Linux hands out pages of 2 MiB where it is asked to (with "madvise", its usual
setting).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

#: Below this malloc may reuse memory that has been touched before.
_LARGE = 2**60


def fresh_rows(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (rows, dim) tensor on the CPU."""
    fresh_ND = torch.empty(rows, dim, dtype=dtype)
    if fresh_ND.nbytes >= _LARGE:
        first = -(-fresh_ND.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = fresh_ND.data_ptr() + fresh_ND.nbytes - first
        # A hint: where it is refused, the memory is as good as without.
        _madvise()(first, length // mmap.PAGESIZE * mmap.PAGESIZE)
    return fresh_ND


@functools.cache
def _madvise() -> Callable[[int, int], object]:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return lambda address, length: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda address, length: madvise(address, length, mmap.MADV_HUGEPAGE)
