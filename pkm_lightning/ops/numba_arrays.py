"""NumPy views of torch tensors, as the numba kernels take them.

Only `cpu` backends import this module, so that the package can be imported without numba and NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pkm_lightning.ops.numba_compilations import time_compilations

# Every kernel's module imports this one or numba_threads.
time_compilations()


def numpy_view(tensor: Tensor) -> Any:
    """Returns a NumPy array that shares the memory of a CPU tensor.

    NumPy has no bfloat16: it is viewed as its bits, in uint16.
    """
    tensor = tensor.detach()
    # Not `Tensor.numpy()`: it marks the storage as not resizable, and FSDP2 frees a gathered parameter by resizing its
    # storage to 0 (seen with torch 2.13). DLPack leaves the storage as it is.
    return np.from_dlpack(_Exported(tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor))


def empty_array(shape: tuple[int, ...], dtype: str) -> Any:
    """Returns an array with arbitrary values, a buffer of a kernel: `i4` or `i8` for integers of so many bytes."""
    return np.empty(shape, dtype)


class _Exported:
    """A CPU tensor as NumPy takes it over: `Tensor.__dlpack__` without its questions about other devices.

    They cost 3 microseconds per array, of which a layer of a small model has dozens.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        # Only versioned capsules (NumPy 2.1) say that NumPy may write.
        if _export is None or options.get("max_version") is None:
            return self._tensor.__dlpack__(**options)
        return _export(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU


_CPU = (1, 0)  # kDLCPU of dlpack.h
_export = getattr(torch._C, "_to_dlpack_versioned", None)
