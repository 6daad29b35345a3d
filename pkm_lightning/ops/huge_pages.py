"""Large tensors in pages of 2 MiB: a processor finds random rows in them without a search per row.

It remembers the places of some thousand pages. A table of 1 GiB has 262,144 pages of 4 KiB and 512 huge ones; on a
virtual machine, where each search is two, rows of 2 KiB took 1,661 ns each from pages of 4 KiB and 364 from huge ones.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

_PAGE = 2**21  # bytes
#: Smaller tensors stay in ordinary pages.
_SMALLEST = 4 * _PAGE
#: Advice of Linux's `madvise`: use huge pages from now on; collapse the pages that exist into huge ones (Linux 6.1).
_HUGEPAGE, _COLLAPSE = 14, 25


def use_huge_pages(values: Tensor, *, is_written: bool = False) -> Tensor:
    """Advises Linux to keep a tensor in host memory in huge pages, and returns the tensor; elsewhere does nothing.

    Linux follows where /sys/kernel/mm/transparent_hugepage/enabled is `madvise` or `always` and memory is free in one
    piece; otherwise pages stay as they are, and nothing is raised. Only pages that lie within the tensor are advised:
    a tensor that is written as a whole takes no more memory, one of which few rows are touched takes 2 MiB per touch.

    Args:
        values: a contiguous tensor.
        is_written: whether the tensor has contents already, which are then copied to huge pages.
    """
    advise = _madvise()
    # Tensors without memory of their own (fake, distributed) are subclasses.
    if advise is None or type(values) not in (Tensor, nn.Parameter) or values.device.type != "cpu":
        return values
    if values.nbytes < _SMALLEST:
        return values
    start = -(-values.data_ptr() // _PAGE) * _PAGE
    length = (values.data_ptr() + values.nbytes) // _PAGE * _PAGE - start
    for advice in (_HUGEPAGE, _COLLAPSE) if is_written else (_HUGEPAGE,):
        advise(start, length, advice)
    return values


def huge_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros, of which large ones on the CPU are in huge pages where the system has them."""
    return use_huge_pages(torch.empty(shape, dtype=dtype, device=device)).zero_()


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Returns the function of the C library, None where the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # no C library that programs may load, or one without this function
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
