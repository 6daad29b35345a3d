"""Tables for which kernels are compiled ahead of time, where no GPU runs them.

Each `triton.py` has a function `launch_examples`, which launches every kernel of the file by the functions that models
call, on tensors of torch's default device. `scripts/compile_kernels.py` makes that the meta device and compiles what
would be launched. The last launch of a kernel has odd sizes, which need every mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Values per row up to which a program takes several rows.
NARROW = (16, 20, 32)
WIDE = (64, 100, 160, 256, 512, 1024)
ODD = 257
DTYPES = (torch.float32, torch.bfloat16)
#: Width and dtype of the tables of a launch.
TABLES = tuple((dim, dtype) for dim in (*NARROW, *WIDE, ODD) for dtype in DTYPES)
ROWS, TOKENS = 2**20, 4096


def ids(*shape: int) -> Tensor:
    """Returns int32 indices, which are not set."""
    return torch.empty(shape, dtype=torch.int32)
