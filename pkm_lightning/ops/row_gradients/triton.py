"""Row gradients on a GPU: one program per segment and block of columns; long segments are first summed in pieces.

Without pieces, one program would sum all reads of a hot row. The first `_PIECE` reads of a segment belong to the
segment's program; each further piece is summed by another program into a buffer, and the segment's program adds those
partial sums in order. The number of reads bounds the number of pieces, so the host never waits for the device.

Letters: L reads, X source rows, V values per row, N rows of the table, U segments, Z = U + 1 limits, P further
pieces; suffixes in kernels: R segments and C columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.row_gradients import eager
from pkm_lightning.ops.segments import Segments

_PIECE = 64
# Columns of one program: narrow slices of the source rows stay in the L2 cache while all segments are processed.
_COLUMNS = 256
# Source rows that one program loads at a time, to hide the latency of memory.
_IN_FLIGHT = 8


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.row_gradients`; float64 takes the eager path."""
    if source_rows_XV.dtype is torch.float64:
        return eager.row_sums(segments, coefficients_L, sources_L, source_rows_XV)
    shape = len(segments.rows_U), source_rows_XV.shape[1]
    grads_UV = torch.empty(shape, dtype=torch.float32, device=source_rows_XV.device)
    _launch(segments, coefficients_L, sources_L, source_rows_XV, grads_UV, compact=True)
    return grads_UV


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor, n_rows: int
) -> Tensor:
    """Computes `eager.table_gradient` without writing compact rows."""
    if source_rows_XV.dtype is torch.float64:
        return eager.table_gradient(segments, coefficients_L, sources_L, source_rows_XV, n_rows)
    table_NV = source_rows_XV.new_zeros(n_rows, source_rows_XV.shape[1])
    _launch(segments, coefficients_L, sources_L, source_rows_XV, table_NV, compact=False)
    return table_NV


def further_pieces(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, per segment, the number of its further pieces and the end of the last one, (U,); their sums, (P, V)."""
    order_L, rows_U, starts_Z = segments
    dim, n_pieces = source_rows_XV.shape[1], order_L.numel() // _PIECE
    further_U = torch.clamp((starts_Z.diff() - 1) // _PIECE, min=0)
    ends_U = further_U.cumsum(0)
    # The segment of each possible piece; `len(rows_U)` for those past the last piece.
    segment_P = torch.searchsorted(ends_U, torch.arange(n_pieces, device=order_L.device), right=True)
    partial_PV = torch.empty(n_pieces, dim, dtype=torch.float32, device=order_L.device)
    if partial_PV.numel():
        sizes = block_sizes(dim)
        with torch.cuda.device_of(partial_PV):
            _sum_pieces[n_pieces, triton.cdiv(dim, sizes["BLOCK_V"])](
                order_L, coefficients_L, sources_L, source_rows_XV, starts_Z, segment_P, further_U, ends_U, partial_PV,
                len(rows_U), **sizes,
            )  # fmt: skip
    return further_U, ends_U, partial_PV


def block_sizes(dim: int) -> dict[str, int]:
    """Returns the constants that every kernel over segments takes."""
    columns = max(16, min(triton.next_power_of_2(dim), _COLUMNS))
    return {"V": dim, "PIECE": _PIECE, "BLOCK_P": _IN_FLIGHT, "BLOCK_V": columns}


def _launch(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor, out_XV: Tensor, compact: bool
) -> None:
    if out_XV.numel() == 0:
        return
    sizes = block_sizes(source_rows_XV.shape[1])
    reads = coefficients_L, sources_L, source_rows_XV
    pieces = further_pieces(segments, *reads)
    grid = len(segments.rows_U), triton.cdiv(sizes["V"], sizes["BLOCK_V"])
    with torch.cuda.device_of(out_XV):
        _sum_segments[grid](
            segments.order_L, *reads, segments.starts_Z, segments.rows_U, *pieces, out_XV, COMPACT=compact, **sizes
        )


@triton.jit
def _piece(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, start, stop, d, in_row,
    V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns `d` of the sum of the reads at `start` to `stop`, of which BLOCK_P source rows are loaded at a time."""
    total = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
    position = start
    while position < stop:
        p = position + tl.arange(0, BLOCK_P)
        live = p < stop
        read = tl.load(order + p, mask=live, other=0)
        coefficient = tl.load(coefficients + read, mask=live, other=0.0).to(tl.float32)
        source = tl.load(sources + read, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & in_row[None, :]
        rows = tl.load(source_rows + source[:, None] * V + d[None, :], mask=mask, other=0.0)
        total += coefficient[:, None] * rows.to(tl.float32)
        position += BLOCK_P
    return tl.sum(total, axis=0)


@triton.jit
def _sum_pieces(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, segment_of, further, ends, partial, n_segments,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes partial[e] = the sum of piece e; pieces are those after the first of each segment, in order."""
    e = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = d < V
    segment = tl.load(segment_of + e)
    # The grid has as many programs as there can be pieces; those past the last piece have nothing to do.
    if segment < n_segments:
        place = e - (tl.load(ends + segment) - tl.load(further + segment)) + 1
        start = tl.load(starts + segment) + place * PIECE
        stop = tl.minimum(start + PIECE, tl.load(starts + segment + 1))
        total = _piece(order, coefficients, sources, source_rows, start, stop, d, in_row, V, BLOCK_P, BLOCK_V)
        # int64, because the number of values may exceed int32.
        tl.store(partial + e.to(tl.int64) * V + d, total, mask=in_row)


@triton.jit
def segment_total(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, further, ends, partial, u, d,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns columns `d` of the sum of segment u: its first piece, then its partial sums in order."""
    in_row = d < V
    start = tl.load(starts + u)
    stop = tl.minimum(start + PIECE, tl.load(starts + u + 1))
    total = _piece(order, coefficients, sources, source_rows, start, stop, d, in_row, V, BLOCK_P, BLOCK_V)
    last = tl.load(ends + u)
    first = last - tl.load(further + u)
    rest = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
    while first < last:
        e = first + tl.arange(0, BLOCK_P)
        mask = (e < last)[:, None] & in_row[None, :]
        rest += tl.load(partial + e[:, None] * V + d[None, :], mask=mask, other=0.0)
        first += BLOCK_P
    return total + tl.sum(rest, axis=0)


@triton.jit
def segment_totals(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, further, ends, partial, u_R, d_C,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns columns `d` of the sums of several segments, (R, C), for rows too narrow to fill a program.

    One read of each segment is loaded at a time, so that their number in flight is that of the segments.
    """
    in_row_1C = (d_C < V)[None, :]
    start_R = tl.load(starts + u_R)
    reads_R = tl.minimum(tl.load(starts + u_R + 1) - start_R, PIECE)
    total_RC = tl.zeros((BLOCK_U, BLOCK_V), dtype=tl.float32)
    place = 0
    most = tl.max(reads_R, axis=0)
    while place < most:
        live_R = place < reads_R
        read_R = tl.load(order + start_R + place, mask=live_R, other=0)
        coefficient_R = tl.load(coefficients + read_R, mask=live_R, other=0.0).to(tl.float32)
        source_R = tl.load(sources + read_R, mask=live_R, other=0).to(tl.int64)
        mask_RC = live_R[:, None] & in_row_1C
        rows_RC = tl.load(source_rows + source_R[:, None] * V + d_C[None, :], mask=mask_RC, other=0.0)
        total_RC += coefficient_R[:, None] * rows_RC.to(tl.float32)
        place += 1
    further_R = tl.load(further + u_R)
    first_R = tl.load(ends + u_R) - further_R
    piece = 0
    most = tl.max(further_R, axis=0)
    while piece < most:
        mask_RC = (piece < further_R)[:, None] & in_row_1C
        total_RC += tl.load(partial + (first_R + piece)[:, None] * V + d_C[None, :], mask=mask_RC, other=0.0)
        piece += 1
    return total_RC


@triton.jit
def _sum_segments(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, rows, further, ends, partial, out,
    COMPACT: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes one block of columns of the sum of segment u to out[u], or to out[rows[u]] if not COMPACT."""
    u = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = u.to(tl.int64)
    if not COMPACT:
        row = tl.load(rows + u).to(tl.int64)
    if row >= 0:
        total = segment_total(
            order, coefficients, sources, source_rows, starts, further, ends, partial, u, d, V, PIECE, BLOCK_P, BLOCK_V
        )
        tl.store(out + row * V + d, total.to(out.dtype.element_ty), mask=d < V)


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Returns kernels with argument types and constants, for compilation ahead of time without a GPU."""
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for element, dim in (("fp32", 1024), ("bf16", 1024), ("bf16", 100)):
        pointers = {"order": "*i64", "coefficients": "*fp32", "sources": "*i32", "source_rows": f"*{element}"}
        pointers |= {"starts": "*i64", "further": "*i64", "ends": "*i64", "partial": "*fp32"}
        sizes = block_sizes(dim)
        cases.append((_sum_pieces, pointers | {"segment_of": "*i64", "n_segments": "i32"}, sizes))
        cases.append((_sum_segments, pointers | {"rows": "*i32", "out": f"*{element}"}, sizes | {"COMPACT": False}))
    cases.append((_sum_segments, pointers | {"rows": "*i32", "out": "*fp32"}, sizes | {"COMPACT": True}))
    return cases
