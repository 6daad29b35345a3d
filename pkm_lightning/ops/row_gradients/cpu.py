"""Row gradients in numba: threads take chunks of equal work, and each segment is summed by one of them in its order.

Chunks are cut by reads and segments together, so that the hot rows of Zipf ids, which lie side by side once sorted, do
not all fall to one thread. Results do not depend on the number of threads.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments, V = U + 1 their limits, C chunks.
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.row_gradients import eager
from pkm_lightning.ops.segments import Segments

_CHUNKS = 64


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`; float64 goes through `eager`."""
    if source_rows_XD.dtype is torch.float64:
        return eager.row_sums(segments, coefficients_L, sources_L, source_rows_XD)
    n_segments = len(segments.rows_U)
    grads_UD = torch.empty(n_segments, source_rows_XD.shape[1])
    targets_U = torch.arange(n_segments, dtype=torch.int32)
    _sum_into(grads_UD, segments._replace(rows_U=targets_U), coefficients_L, sources_L, source_rows_XD)
    return grads_UD


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.table_gradient`; in one pass for float32 and bfloat16."""
    if source_rows_XD.dtype not in (torch.float32, torch.bfloat16):
        return eager.table_gradient(segments, coefficients_L, sources_L, source_rows_XD, n_rows)
    live = int((segments.rows_U >= 0).sum())
    segments = Segments(segments.order_L, segments.rows_U[:live], segments.starts_V[: live + 1])
    table_ND = source_rows_XD.new_empty(n_rows, source_rows_XD.shape[1])
    _sum_into(table_ND, segments, coefficients_L, sources_L, source_rows_XD)
    return table_ND


def _sum_into(
    out_ND: Tensor, segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor
) -> None:
    inputs = (
        segments.order_L,
        segments.starts_V,
        segments.rows_U,
        coefficients_L.float(),
        sources_L.int(),
        source_rows_XD.float(),
        torch.empty(_CHUNKS, source_rows_XD.shape[1]),
        out_ND,
    )
    use_torch_threads()
    _sum_segments(*map(as_numpy, inputs))


def as_numpy(values: Tensor) -> Any:
    """A view of contiguous `values` for numba kernels, which do not know bfloat16: its bits travel as uint16."""
    values = values.detach()
    return values.view(torch.uint16).numpy() if values.dtype is torch.bfloat16 else values.numpy()


@intrinsic
def _narrowed(typing_context, value, like):  # type: ignore[no-untyped-def]
    """A float32 in the form of `like`: itself, or the bits of the nearest bfloat16 (ties to even, NaN kept)."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]

        def constant(number: int) -> Any:
            return context.get_constant(types.uint32, number)

        bits = builder.bitcast(arguments[0], context.get_value_type(types.uint32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), odd), constant(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        kept = builder.select(is_nan, constant(0x7FC0), rounded)
        return builder.trunc(kept, context.get_value_type(types.uint16))

    return like(value, like), code


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
def _sum_segments(order_L, starts_V, rows_U, coefficients_L, sources_L, source_rows_XD, sum_CD, out_ND):  # type: ignore[no-untyped-def]
    """Writes every row of `out_ND`: the sums to the ascending `rows_U`, zeros between them."""
    n_segments, dim = len(rows_U), out_ND.shape[1]
    work = starts_V[n_segments] + n_segments
    for chunk in numba.prange(_CHUNKS):
        sum_D = sum_CD[chunk]
        first = _first_segment(starts_V, chunk * work // _CHUNKS)
        stop = _first_segment(starts_V, (chunk + 1) * work // _CHUNKS)
        for u in range(first, stop):
            row, before = rows_U[u], rows_U[u - 1] if u else -1
            out_ND[before + 1 : row] = 0
            sum_D[:] = 0
            for position in range(starts_V[u], starts_V[u + 1]):
                read = order_L[position]
                coefficient, source = coefficients_L[read], sources_L[read]
                for d in range(dim):
                    sum_D[d] += coefficient * source_rows_XD[source, d]
            for d in range(dim):
                out_ND[row, d] = _narrowed(sum_D[d], out_ND[row, d])
    out_ND[rows_U[n_segments - 1] + 1 :] = 0
