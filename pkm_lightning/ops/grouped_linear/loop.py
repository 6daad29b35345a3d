"""grouped_linear as one matrix product per group, on any device and in any dtype; also the reference of the op.

Letters: M rows, C rows of one group, E groups, I values in, O values out.
"""

from __future__ import annotations

import torch
from torch import Tensor


# Not traced: the number of rows per group depends on the data, so each new set of counts would be compiled again. This
# is the lazy form of `torch.compiler.disable`, which would load the compiler when the package is imported (1.6 s).
@torch._disable_dynamo
def grouped_linear_loop(x_MI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.grouped_linear`; reads the counts on the host.

    Raises:
        ValueError: the counts do not add up to the number of rows.
    """
    if x_MI.is_meta:
        # Counts have no values on the meta device; shape and FLOPs are the same for every split of the rows.
        return x_MI @ weight_EIO[0]
    counts = counts_E.tolist()
    if sum(counts) != len(x_MI):
        raise ValueError(f"grouped_linear: counts add up to {sum(counts)}, but there are {len(x_MI)} rows.")
    # `unbind` gives all weights one gradient together; indexing would add E gradients of the full size.
    return torch.cat(
        [x_CI @ weight_IO for x_CI, weight_IO in zip(x_MI.split(counts), weight_EIO.unbind(), strict=True)]
    )
