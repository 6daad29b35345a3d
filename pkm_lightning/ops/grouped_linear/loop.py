"""The grouped linear map as it is written on paper: one matrix product a group.

Letters: M rows, E groups, I values in, O values out.
"""

from __future__ import annotations

import torch
from torch import Tensor


# How many rows a group has depends on the data: traced, every new set of counts would be compiled anew. This is the
# lazy form of `torch.compiler.disable`, which would make importing the package load the compiler (1.6 s).
@torch._disable_dynamo
def grouped_linear_loop(x_MI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """See `pkm_lightning.ops.grouped_linear`; reads the counts on the host."""
    if x_MI.is_meta:
        # Counts have no values there; the shape and the FLOPs are the same whichever rows are whose.
        return x_MI @ weight_EIO[0]
    counts = counts_E.tolist()
    if sum(counts) != len(x_MI):
        raise ValueError(f"grouped_linear: counts add up to {sum(counts)}, but there are {len(x_MI)} rows.")
    # `unbind` gives all weights one gradient together; indexing would add E gradients of the full size.
    return torch.cat(
        [x_CI @ weight_IO for x_CI, weight_IO in zip(x_MI.split(counts), weight_EIO.unbind(), strict=True)]
    )
