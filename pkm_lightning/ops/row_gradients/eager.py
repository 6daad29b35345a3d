"""Row gradients through ATen's embedding bag, turned around: the bags are segments, the "table" is the source rows.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.segments import Segments


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`; deterministic on every device, as a bag has one reader."""
    # ATen returns the dtype of its "table": half precision goes in as float32, or each sum would be rounded to it.
    wide = torch.promote_types(source_rows_XD.dtype, torch.float32)
    sources_L = sources_L[segments.order_L]
    return torch.nn.functional.embedding_bag(
        sources_L,
        source_rows_XD.to(wide),
        segments.starts_V.to(sources_L.dtype),
        per_sample_weights=coefficients_L.to(wide)[segments.order_L],
        mode="sum",
        include_last_offset=True,
    )


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.table_gradient`."""
    sums_UD = row_sums(segments, coefficients_L, sources_L, source_rows_XD).to(source_rows_XD.dtype)
    # Empty segments (row -1, all zeros) go to one row past the end.
    table_ND = sums_UD.new_zeros(n_rows + 1, sums_UD.shape[1])
    rows_U = segments.rows_U.long()
    table_ND[torch.where(rows_U < 0, n_rows, rows_U)] = sums_UD
    return table_ND[:n_rows]
