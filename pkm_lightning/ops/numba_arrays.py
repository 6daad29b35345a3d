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
    return np.from_dlpack(tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor)
