"""Row gradients by ATen's embedding bag: the bags are the segments, and the table of the bag is the source rows.

Letters: L reads, X source rows, V values per row, N rows of the table, U segments, R = N + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.segments import Segments


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.row_gradients`; deterministic on every device, as a bag has one reader."""
    # ATen sums in float32 but returns the dtype of its table, so half precision is converted before.
    wide_XV = source_rows_XV.to(torch.promote_types(source_rows_XV.dtype, torch.float32))
    return _bags(segments.starts_Z, segments.order_L, coefficients_L, sources_L, wide_XV)


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor, n_rows: int
) -> Tensor:
    """Returns the same sums for all N rows of the table, in the dtype of the source rows, zero for rows not read.

    Every row of the table is a bag, most of them empty, so that the result is written once, without compact rows.
    """
    if coefficients_L.numel() == 0:
        return source_rows_XV.new_zeros(n_rows, source_rows_XV.shape[1])
    counts_R = segments.starts_Z.new_zeros(n_rows + 1)
    # An empty segment (row -1) writes its count, a zero, to the first place.
    counts_R[segments.rows_U.long() + 1] = segments.starts_Z.diff()
    return _bags(counts_R.cumsum(0), segments.order_L, coefficients_L, sources_L, source_rows_XV)


def _bags(limits: Tensor, order_L: Tensor, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> Tensor:
    """One row per pair of neighbouring `limits` of the sorted reads."""
    return torch.nn.functional.embedding_bag(
        sources_L[order_L],
        source_rows_XV,
        limits.to(sources_L.dtype),  # must be of the dtype of the indices
        per_sample_weights=coefficients_L.to(source_rows_XV.dtype)[order_L],
        mode="sum",
        include_last_offset=True,
    )
