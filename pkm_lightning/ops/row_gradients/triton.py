"""Row gradients on a GPU: each program sums a tile of segments and columns; long segments are first summed in pieces.

A program loads one read of each of its segments at a time, so that many independent loads are in flight. It takes the
first `_PIECE` reads of a segment; each further piece is summed by another program into a buffer, and the pieces of one
segment are then joined into one row of it. So no program waits for a hot row.

Pieces need no bookkeeping: a further piece that begins at sorted read q has place q // _PIECE of the buffer, which no
other further piece has. The number of reads bounds the number of places, so the host never waits for the device.

Letters: L reads, X source rows, V values per row, N rows of the table, U segments, Z = U + 1 limits, P places of
pieces; suffixes in kernels: R segments and C columns of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ROWS, TABLES, TOKENS, ids
from pkm_lightning.ops.row_gradients import eager
from pkm_lightning.ops.segments import Segments, read_segments

#: Reads of a piece, the most that a program waits for.
_PIECE = 64
#: Values of a tile.
_TILE = 2048
#: Most columns of a tile: narrow slices of the source rows stay in the L2 cache while all segments are processed.
_COLUMNS = 256
#: Fewest columns of a tile that covers a part of a row: whole cache lines of fp32.
_NARROWEST = 32
_WARPS = 4


class SortedReads(NamedTuple):
    """What every kernel over segments takes: the reads in the order of their segments."""

    coefficients_L: Tensor
    sources_L: Tensor
    source_rows_XV: Tensor
    starts_Z: Tensor
    #: The sum of all further pieces of a segment, at the place of the first of them; fp32.
    partial_PV: Tensor


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


def sort_reads(segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> SortedReads:
    """Returns the reads in the order of their segments, and sums the further pieces of long segments."""
    order_L, rows_U, starts_Z = segments
    reads, dim = order_L.numel(), source_rows_XV.shape[1]
    # Kernels would find a read by its segment, then its coefficient by the read: here they skip one link of the chain.
    sorted_reads = coefficients_L.index_select(0, order_L), sources_L.index_select(0, order_L)
    places = triton.cdiv(reads, _PIECE) if reads > _PIECE else 0
    partial_PV = torch.empty(places, dim, dtype=torch.float32, device=order_L.device)
    result = SortedReads(*sorted_reads, source_rows_XV.contiguous(), starts_Z, partial_PV)
    if partial_PV.numel():
        # Place p belongs to the segment of read p * _PIECE - 1, because a further piece follows _PIECE other reads.
        before_P = torch.arange(-1, reads - 1, _PIECE, device=order_L.device)
        after_P = torch.searchsorted(starts_Z, before_P, right=True)
        sizes = _piece_sizes(dim)
        grid = places, triton.cdiv(dim, sizes["BLOCK_V"])
        with torch.cuda.device_of(partial_PV):
            _sum_pieces[grid](*result, after_P, len(rows_U), **sizes)
            _join_pieces[grid](starts_Z, partial_PV, after_P, len(rows_U), **sizes)
    return result


def block_sizes(dim: int) -> dict[str, int]:
    """Returns the constants of every kernel over tiles, whose width divides the row unless they would be too narrow."""
    width = dim & -dim  # the largest power of two that divides it
    columns = width if width >= _NARROWEST else triton.next_power_of_2(dim)
    columns = max(16, min(columns, _COLUMNS))
    # Where no 128-bit loads are possible, each value has an address in registers of its own.
    tile = _TILE if width >= 8 else _TILE // 2
    return {"V": dim, "PIECE": _PIECE, "BLOCK_R": tile // columns, "BLOCK_V": columns, "num_warps": _WARPS}


def tile_grid(n_segments: int, sizes: dict[str, int]) -> tuple[int]:
    """Returns the grid of a kernel that calls `tile_at`."""
    return (triton.cdiv(n_segments, sizes["BLOCK_R"]) * triton.cdiv(sizes["V"], sizes["BLOCK_V"]),)


def by_slices(reads: SortedReads) -> bool:
    """Returns whether all tiles of a block of columns come before those of the next block.

    Source rows that have several reads then stay in the L2 cache, a slice at a time. Where each has one, the parts of
    a row are fetched together instead.
    """
    return len(reads.source_rows_XV) < len(reads.sources_L)


def _piece_sizes(dim: int) -> dict[str, int]:
    sizes = block_sizes(dim)
    return {"V": dim, "PIECE": _PIECE, "BLOCK_P": min(_PIECE, sizes["BLOCK_R"]), "BLOCK_V": sizes["BLOCK_V"]}


def _launch(
    segments: Segments, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor, out_XV: Tensor, compact: bool
) -> None:
    if out_XV.numel() == 0:
        return
    sizes = block_sizes(source_rows_XV.shape[1])
    reads = sort_reads(segments, coefficients_L, sources_L, source_rows_XV)
    n_segments = len(segments.rows_U)
    with torch.cuda.device_of(out_XV):
        _sum_segments[tile_grid(n_segments, sizes)](
            *reads, segments.rows_U, out_XV, n_segments, COMPACT=compact, BY_SLICES=by_slices(reads), **sizes
        )


@triton.jit
def _piece_at(p, starts, after, n_segments, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the start of the segment that place p belongs to, and the limits of its reads from place p on."""
    segment = tl.load(after + p) - 1
    exists = (segment >= 0) & (segment < n_segments)
    segment = tl.minimum(tl.maximum(segment, 0), n_segments - 1)
    start = tl.load(starts + segment)
    stop = tl.load(starts + segment + 1)
    first = start + (p.to(tl.int64) * PIECE - start + PIECE - 1) // PIECE * PIECE
    return start, tl.where(exists, first, stop), stop


# Triton specialises integers of 1 and multiples of 16: a number that changes every step would compile more kernels.
@triton.jit(do_not_specialize=["n_segments"])
def _sum_pieces(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, after, n_segments,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes partial[p] = the sum of the further piece with place p, of which BLOCK_P reads are loaded at a time."""
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    _, first, stop = _piece_at(place, starts, after, n_segments, PIECE)
    # The grid has a program for every place; most have nothing to do where few rows are hot.
    if first < stop:
        stop = tl.minimum(stop, first + PIECE)
        total = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
        for step in range(0, PIECE, BLOCK_P):
            p = first + step + tl.arange(0, BLOCK_P)
            live = p < stop
            coefficient = tl.load(coefficients + p, mask=live, other=0.0).to(tl.float32)
            source = tl.load(sources + p, mask=live, other=0).to(tl.int64)
            mask = live[:, None] & (d < V)[None, :]
            rows = tl.load(source_rows + source[:, None] * V + d[None, :], mask=mask, other=0.0)
            total += coefficient[:, None] * rows.to(tl.float32)
        # int64, because the number of values may exceed int32.
        tl.store(partial + place.to(tl.int64) * V + d, tl.sum(total, axis=0), mask=d < V)


@triton.jit(do_not_specialize=["n_segments"])
def _join_pieces(  # type: ignore[no-untyped-def]
    starts, partial, after, n_segments,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds the further pieces of each segment to the first of them; their places follow each other."""
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    start, first, stop = _piece_at(place, starts, after, n_segments, PIECE)
    if (first == start + PIECE) & (first + PIECE < stop):
        last = place + (stop - first + PIECE - 1) // PIECE
        total = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
        for begin in range(place.to(tl.int64), last, BLOCK_P):
            p = begin + tl.arange(0, BLOCK_P)
            mask = (p < last)[:, None] & (d < V)[None, :]
            total += tl.load(partial + p[:, None] * V + d[None, :], mask=mask, other=0.0)
        tl.store(partial + place.to(tl.int64) * V + d, tl.sum(total, axis=0), mask=d < V)


@triton.jit
def tile_at(  # type: ignore[no-untyped-def]
    program, n_segments, BY_SLICES: tl.constexpr, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Returns the segments (R,) and columns (C,) of a program; the last tile has segments past the last."""
    if BY_SLICES:
        tiles = tl.cdiv(n_segments, BLOCK_R)
        tile, block = program % tiles, program // tiles
    else:
        blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        tile, block = program // blocks, program % blocks
    return tile * BLOCK_R + tl.arange(0, BLOCK_R), block * BLOCK_V + tl.arange(0, BLOCK_V)


@triton.jit
def segment_totals(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, u_R, d_C,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns columns `d` of the sums of the segments `u`, (R, C): the first piece of each, then its further ones."""
    # All numbers per segment are columns (R, 1), not vectors: where it needs a vector in two layouts, Triton 3.6 mixes
    # them up and does not compile.
    in_row_1C = (d_C < V)[None, :]
    start_R1 = tl.load(starts + u_R[:, None])
    n_R1 = tl.load(starts + u_R[:, None] + 1) - start_R1
    reads_R1 = tl.minimum(n_R1, PIECE).to(tl.int32)
    total_RC = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
    # The number of the next source row is loaded while the present row is under way.
    source_R1 = tl.load(sources + start_R1, mask=reads_R1 > 0, other=0).to(tl.int64)
    coefficient_R1 = tl.load(coefficients + start_R1, mask=reads_R1 > 0, other=0.0).to(tl.float32)
    for place in range(1, tl.max(tl.max(reads_R1, axis=0), axis=0) + 1):
        mask_RC = (place <= reads_R1) & in_row_1C
        rows_RC = tl.load(source_rows + source_R1 * V + d_C[None, :], mask=mask_RC, other=0.0)
        follows_R1 = place < reads_R1
        next_R1 = tl.load(sources + start_R1 + place, mask=follows_R1, other=0).to(tl.int64)
        next_coefficient_R1 = tl.load(coefficients + start_R1 + place, mask=follows_R1, other=0.0).to(tl.float32)
        total_RC += coefficient_R1 * rows_RC.to(tl.float32)
        source_R1, coefficient_R1 = next_R1, next_coefficient_R1
    if tl.max(tl.max(n_R1, axis=0), axis=0) > PIECE:
        further_R1 = start_R1 // PIECE + 1
        mask_RC = (n_R1 > PIECE) & in_row_1C
        total_RC += tl.load(partial + further_R1 * V + d_C[None, :], mask=mask_RC, other=0.0)
    return total_RC


@triton.jit(do_not_specialize=["n_segments"])
def _sum_segments(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, rows, out, n_segments,
    COMPACT: tl.constexpr, BY_SLICES: tl.constexpr,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes one block of columns of the sum of segment u to out[u], or to out[rows[u]] if not COMPACT."""
    u_R, d_C = tile_at(tl.program_id(0), n_segments, BY_SLICES, V, BLOCK_R, BLOCK_V)
    # The last program reads its last segment several times, and writes it once.
    at_R = tl.minimum(u_R, n_segments - 1)
    total_RC = segment_totals(
        coefficients, sources, source_rows, starts, partial, at_R, d_C, V, PIECE, BLOCK_R, BLOCK_V
    )  # fmt: skip
    row_R = at_R if COMPACT else tl.load(rows + at_R)
    mask_RC = ((u_R < n_segments) & (row_R >= 0))[:, None] & (d_C < V)[None, :]
    at_RC = row_R.to(tl.int64)[:, None] * V + d_C[None, :]
    tl.store(out + at_RC, total_RC.to(out.dtype.element_ty), mask=mask_RC)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    segments, sources_L = read_segments(ids(TOKENS * 16), ROWS), ids(TOKENS * 16)
    for dim, dtype in TABLES:
        # Several reads share the gradient of a token, or each has one of its own.
        for sources in (TOKENS, TOKENS * 16):
            source_rows_XV, coefficients_L = torch.empty(sources, dim, dtype=dtype), torch.empty(TOKENS * 16)
            if sources == TOKENS:
                row_sums(segments, coefficients_L, sources_L, source_rows_XV)
            else:
                table_gradient(segments, coefficients_L, sources_L, source_rows_XV, ROWS)
