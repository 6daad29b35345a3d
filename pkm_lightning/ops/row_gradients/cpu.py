"""Row gradients in numba: threads take chunks of equal work, and each segment is summed by one of them in its order.

Chunks are cut by reads and segments together, so that the hot rows of Zipf ids, which lie side by side once sorted, do
not all fall to one thread. Results do not depend on the number of threads.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments, V = U + 1 their limits.
"""

from __future__ import annotations

import numba
import torch
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.row_gradients import eager
from pkm_lightning.ops.row_gradients.huge_pages import fresh_rows
from pkm_lightning.ops.segments import Segments

_CHUNKS = 64


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`; float64 goes through `eager`."""
    if source_rows_XD.dtype is torch.float64:
        return eager.row_sums(segments, coefficients_L, sources_L, source_rows_XD)
    n_segments = len(segments.rows_U)
    targets_U = torch.arange(n_segments, dtype=torch.int32)
    return _summed(segments._replace(rows_U=targets_U), coefficients_L, sources_L, source_rows_XD, n_segments)


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.table_gradient`; other dtypes than float32 go through the compact rows."""
    if source_rows_XD.dtype is torch.float64:
        return eager.table_gradient(segments, coefficients_L, sources_L, source_rows_XD, n_rows)
    n_segments = int((segments.rows_U >= 0).sum())
    segments = Segments(segments.order_L, segments.rows_U[:n_segments], segments.starts_V[: n_segments + 1])
    if source_rows_XD.dtype is torch.float32:
        return _summed(segments, coefficients_L, sources_L, source_rows_XD, n_rows)
    sums_UD = row_sums(segments, coefficients_L, sources_L, source_rows_XD)
    dim, dtype = source_rows_XD.shape[1], source_rows_XD.dtype
    table_ND = fresh_rows(n_rows, dim, dtype).zero_()
    return table_ND.index_copy_(0, segments.rows_U.long(), fresh_rows(n_segments, dim, dtype).copy_(sums_UD))


def _summed(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    out_ND = fresh_rows(n_rows, source_rows_XD.shape[1], torch.float32)
    inputs = (
        segments.order_L,
        segments.starts_V,
        segments.rows_U.int(),
        coefficients_L.float(),
        sources_L.int(),
        source_rows_XD.float(),
    )
    use_torch_threads()
    _sum_segments(*(tensor.detach().contiguous().numpy() for tensor in inputs), out_ND.numpy())
    return out_ND


@numba.njit(nogil=True, cache=True)
def _first_segment(starts_V, goal):  # type: ignore[no-untyped-def]
    """The first segment before which there is work of at least `goal`: one unit for a read, one for a segment."""
    low, high = 0, len(starts_V) - 1
    while low < high:
        middle = (low + high) // 2
        if starts_V[middle] + middle < goal:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True, parallel=True)
def _sum_segments(order_L, starts_V, rows_U, coefficients_L, sources_L, source_rows_XD, out_ND):  # type: ignore[no-untyped-def]
    """Writes every row of `out_ND`: the sums to the ascending `rows_U`, zeros between them."""
    n_segments, dim = len(rows_U), out_ND.shape[1]
    work = starts_V[n_segments] + n_segments
    for chunk in numba.prange(_CHUNKS):
        first = _first_segment(starts_V, chunk * work // _CHUNKS)
        stop = _first_segment(starts_V, (chunk + 1) * work // _CHUNKS)
        for u in range(first, stop):
            row, before = rows_U[u], rows_U[u - 1] if u else -1
            out_ND[before + 1 : row + 1] = 0
            for position in range(starts_V[u], starts_V[u + 1]):
                read = order_L[position]
                coefficient, source = coefficients_L[read], sources_L[read]
                for d in range(dim):
                    out_ND[row, d] += coefficient * source_rows_XD[source, d]
    out_ND[rows_U[n_segments - 1] + 1 :] = 0
