"""Row gradients on a GPU: one program a segment and block of columns; long segments are first summed in pieces.

A hot row would otherwise be one program's work from beginning to end. The first `_PIECE` reads of a segment belong to
its own program; each further piece is summed by another one into a buffer, and the segment's program adds those
partial sums in order. How many pieces there can be follows from the number of reads, so the host never waits.

Letters: L reads, X source rows, D values a row, N rows of the table, U segments, E further pieces.
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
_COLUMNS = 256  # in one program: narrow slices of the source rows stay in the L2 cache while all segments pass
_IN_FLIGHT = 8  # source rows whose loads one program has under way


def row_sums(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor) -> Tensor:
    """See `pkm_lightning.ops.row_gradients.row_gradients`; float64 goes through `eager`."""
    if source_rows_XD.dtype is torch.float64:
        return eager.row_sums(segments, coefficients_L, sources_L, source_rows_XD)
    shape = len(segments.rows_U), source_rows_XD.shape[1]
    grads_UD = torch.empty(shape, dtype=torch.float32, device=source_rows_XD.device)
    _launch(segments, coefficients_L, sources_L, source_rows_XD, grads_UD, compact=True)
    return grads_UD


def table_gradient(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, n_rows: int
) -> Tensor:
    """See `eager.table_gradient`; the compact rows are never written."""
    if source_rows_XD.dtype is torch.float64:
        return eager.table_gradient(segments, coefficients_L, sources_L, source_rows_XD, n_rows)
    table_ND = source_rows_XD.new_zeros(n_rows, source_rows_XD.shape[1])
    _launch(segments, coefficients_L, sources_L, source_rows_XD, table_ND, compact=False)
    return table_ND


def further_pieces(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each segment the number of its further pieces and where the last of them ends, (U,); their sums, (E, D)."""
    order_L, rows_U, starts_V = segments
    dim, n_pieces = source_rows_XD.shape[1], order_L.numel() // _PIECE
    further_U = torch.clamp((starts_V.diff() - 1) // _PIECE, min=0)
    ends_U = further_U.cumsum(0)
    segment_E = torch.searchsorted(ends_U, torch.arange(n_pieces, device=order_L.device), right=True)
    partial_ED = torch.empty(n_pieces, dim, dtype=torch.float32, device=order_L.device)
    if partial_ED.numel():
        sizes = block_sizes(dim)
        with torch.cuda.device_of(partial_ED):
            _sum_pieces[n_pieces, triton.cdiv(dim, sizes["BLOCK_D"])](
                order_L, coefficients_L, sources_L, source_rows_XD, starts_V, segment_E, further_U, ends_U, partial_ED,
                len(rows_U), **sizes,
            )  # fmt: skip
    return further_U, ends_U, partial_ED


def block_sizes(dim: int) -> dict[str, int]:
    """The constants that every kernel over segments takes."""
    columns = max(16, min(triton.next_power_of_2(dim), _COLUMNS))
    return {"D": dim, "PIECE": _PIECE, "BLOCK_P": _IN_FLIGHT, "BLOCK_D": columns}


def _launch(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XD: Tensor, out_XD: Tensor, compact: bool
) -> None:
    if out_XD.numel() == 0:
        return
    sizes = block_sizes(source_rows_XD.shape[1])
    reads = coefficients_L, sources_L, source_rows_XD
    pieces = further_pieces(segments, *reads)
    grid = len(segments.rows_U), triton.cdiv(sizes["D"], sizes["BLOCK_D"])
    with torch.cuda.device_of(out_XD):
        _sum_segments[grid](
            segments.order_L, *reads, segments.starts_Z, segments.rows_U, *pieces, out_XD, COMPACT=compact, **sizes
        )


@triton.jit
def _piece(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, start, stop, d, in_row,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns `d` of the sum of the reads at `start` to `stop`: BLOCK_P source rows are on their way at a time."""
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    position = start
    while position < stop:
        p = position + tl.arange(0, BLOCK_P)
        live = p < stop
        read = tl.load(order + p, mask=live, other=0)
        coefficient = tl.load(coefficients + read, mask=live, other=0.0).to(tl.float32)
        source = tl.load(sources + read, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & in_row[None, :]
        rows = tl.load(source_rows + source[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += coefficient[:, None] * rows.to(tl.float32)
        position += BLOCK_P
    return tl.sum(total, axis=0)


@triton.jit
def _sum_pieces(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, segment_of, further, ends, partial, n_segments,
    D: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[e] = the sum of piece e, the pieces after the first of all segments, in order."""
    e = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    segment = tl.load(segment_of + e)
    # There are as many programs as there can be pieces; those past the last one have nothing to do.
    if segment < n_segments:
        place = e - (tl.load(ends + segment) - tl.load(further + segment)) + 1
        start = tl.load(starts + segment) + place * PIECE
        stop = tl.minimum(start + PIECE, tl.load(starts + segment + 1))
        total = _piece(order, coefficients, sources, source_rows, start, stop, d, in_row, D, BLOCK_P, BLOCK_D)
        tl.store(partial + e.to(tl.int64) * D + d, total, mask=in_row)


@triton.jit
def segment_total(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, further, ends, partial, u, d,
    D: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns `d` of the sum of segment u: its first piece and then its partial sums, in order."""
    in_row = d < D
    start = tl.load(starts + u)
    stop = tl.minimum(start + PIECE, tl.load(starts + u + 1))
    total = _piece(order, coefficients, sources, source_rows, start, stop, d, in_row, D, BLOCK_P, BLOCK_D)
    last = tl.load(ends + u)
    first = last - tl.load(further + u)
    rest = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    while first < last:
        e = first + tl.arange(0, BLOCK_P)
        mask = (e < last)[:, None] & in_row[None, :]
        rest += tl.load(partial + e[:, None] * D + d[None, :], mask=mask, other=0.0)
        first += BLOCK_P
    return total + tl.sum(rest, axis=0)


@triton.jit
def _sum_segments(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, rows, further, ends, partial, out,
    COMPACT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[u], or out[rows[u]] if not COMPACT, = one block of columns of the sum of segment u."""
    u = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = u.to(tl.int64)
    if not COMPACT:
        row = tl.load(rows + u).to(tl.int64)
    if row >= 0:
        total = segment_total(
            order, coefficients, sources, source_rows, starts, further, ends, partial, u, d, D, PIECE, BLOCK_P, BLOCK_D
        )
        tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=d < D)


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernels with argument types and constants, for compilation ahead of time without a GPU."""
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for element, dim in (("fp32", 1024), ("bf16", 1024), ("bf16", 100)):
        pointers = {"order": "*i64", "coefficients": "*fp32", "sources": "*i32", "source_rows": f"*{element}"}
        pointers |= {"starts": "*i64", "further": "*i64", "ends": "*i64", "partial": "*fp32"}
        sizes = block_sizes(dim)
        cases.append((_sum_pieces, pointers | {"segment_of": "*i64", "n_segments": "i32"}, sizes))
        cases.append((_sum_segments, pointers | {"rows": "*i32", "out": f"*{element}"}, sizes | {"COMPACT": False}))
    cases.append((_sum_segments, pointers | {"rows": "*i32", "out": "*fp32"}, sizes | {"COMPACT": True}))
    return cases
