"""The number of threads of the numba kernels, which follows that of torch.

Only `cpu` backends import this module, so that the package can be imported without numba.
"""

from __future__ import annotations

import threading

import numba
import torch

from pkm_lightning.ops.numba_compilations import time_compilations

# Every kernel's module imports this one or numba_arrays.
time_compilations()

_this_thread = threading.local()


def use_torch_threads() -> None:
    """Sets the number of threads of numba kernels started by this thread to torch's, or to numba's maximum if lower."""
    threads = torch.get_num_threads()
    # numba keeps the limit per calling thread, and autograd runs backwards in threads of its own.
    if getattr(_this_thread, "threads", None) == threads:
        return
    _this_thread.threads = threads
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # The first call starts numba's thread pool. That sets the thread count of the OpenMP runtime, which torch shares,
    # to the number of cores; torch gets its own number back.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
