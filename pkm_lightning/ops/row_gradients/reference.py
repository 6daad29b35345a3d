"""Row gradients by a loop over the segments.

Letters: L reads, X source rows, V values per row, N rows of the table, U segments.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pkm_lightning.ops.segments import Segments


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.row_gradients`."""
    wide = torch.promote_types(source_rows_XV.dtype, torch.float32)
    grads_UV = source_rows_XV.new_zeros(len(segments.rows_U), source_rows_XV.shape[1], dtype=wide)
    limits = segments.starts_Z.tolist()
    for u, (start, stop) in enumerate(itertools.pairwise(limits)):
        for read in segments.order_L[start:stop]:
            grads_UV[u] += coefficients_L[read].to(wide) * source_rows_XV[sources_L[read].long()].to(wide)
    return grads_UV
