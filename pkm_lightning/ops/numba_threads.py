"""One number of threads for torch and for the numba kernels beside it: torch's.

Imported by `cpu` backends only, so that the package imports without numba.
"""

from __future__ import annotations

import numba
import torch


def use_torch_threads() -> None:
    """Gives the numba kernels that this thread starts as many threads as torch has, where numba has that many."""
    threads = torch.get_num_threads()
    # numba forgets the limit with the thread that set it, so every call of a kernel sets it anew; it costs nothing.
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # The first call starts numba's threads, and gives the OpenMP that torch shares with it as many as there are cores.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
