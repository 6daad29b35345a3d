"""Row gradients through ATen's embedding bag, turned around: the bags are segments, the "table" is the source rows.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments, V = U + 1 and M = N + 1 limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.segments import Segments


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`; deterministic on every device, as a bag has one reader."""
    # ATen sums in float32 but returns the dtype of its "table", so half precision goes in as float32.
    wide_XD = source_rows_XD.to(torch.promote_types(source_rows_XD.dtype, torch.float32))
    return _bags(segments.starts_Z, segments.order_L, coefficients_L, sources_L, wide_XD)


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    """The same sums as all N rows of the table, in the dtype of the source rows and zero where nobody read.

    Every row of the table is a bag, mostly an empty one: the result is written once, and no compact rows before it.
    """
    if coefficients_L.numel() == 0:
        return source_rows_XD.new_zeros(n_rows, source_rows_XD.shape[1])
    counts_M = segments.starts_Z.new_zeros(n_rows + 1)
    # An empty segment (row -1) falls on the first place, and what it puts there is a zero.
    counts_M[segments.rows_U.long() + 1] = segments.starts_Z.diff()
    return _bags(counts_M.cumsum(0), segments.order_L, coefficients_L, sources_L, source_rows_XD)


def _bags(limits: Tensor, order_L: Tensor, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """One row for each pair of neighbouring `limits` of the sorted reads."""
    return torch.nn.functional.embedding_bag(
        sources_L[order_L],
        source_rows_XD,
        limits.to(sources_L.dtype),
        per_sample_weights=coefficients_L.to(source_rows_XD.dtype)[order_L],
        mode="sum",
        include_last_offset=True,
    )
