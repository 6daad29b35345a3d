"""Row gradients as they are written on paper: a loop over the segments.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pkm_lightning.ops.segments import Segments


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`."""
    wide = torch.promote_types(source_rows_XD.dtype, torch.float32)
    grads_UD = source_rows_XD.new_zeros(len(segments.rows_U), source_rows_XD.shape[1], dtype=wide)
    limits = segments.starts_Z.tolist()
    for u, (start, stop) in enumerate(itertools.pairwise(limits)):
        for read in segments.order_L[start:stop]:
            grads_UD[u] += coefficients_L[read].to(wide) * source_rows_XD[sources_L[read].long()].to(wide)
    return grads_UD
