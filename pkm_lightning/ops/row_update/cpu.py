"""The row update as one pass over the touched rows: sum the reads of a row, apply the rule, write it back (numba).

A row's sum lives in a scratch line that stays in the first-level cache; row and state are read and written once, and
asked for two rows ahead, since no hardware foresees which row comes next (lazy Adam takes half the time). The sum is
computed a second time for the norm instead of being kept: source rows are few and cached, row gradients are not.

Letters: N rows, D values a row, U rows touched, L reads, C chunks, each with scratch lines of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir
from numba import float32, int16, njit, prange, types, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.row_update.rules import KINDS, RowRule

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient

_SGD, _ROW_ADAGRAD, _LAZY_ADAM, _CATCH_UP_ADAM = (KINDS.index(kind) for kind in KINDS)
_CHUNKS = 64
_AHEAD = 2
_CACHE_LINE = 64  # bytes
# Python's error model tests every division for zero, which keeps a loop from being vectorised.
_KERNEL = {"cache": True, "nogil": True, "error_model": "numpy"}


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """See `pkm_lightning.ops.row_update`."""
    # In fp64 the order of the sum, which depends on the number of threads, does not reach the result.
    return row_gradient_squares(gradient).double().sum().sqrt().float()


def row_gradient_squares(gradient: RowGradient) -> Tensor:
    """See `pkm_lightning.ops.row_update`."""
    use_torch_threads()
    squares_U = torch.empty(len(gradient.segments.rows_U), dtype=torch.float32)
    scratch_C2D, bits_C2D = _scratch(gradient)
    _squares(*_reads(gradient), squares_U.numpy(), scratch_C2D, bits_C2D)
    return squares_U


def row_update(
    table_ND: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    row_squares_U: Tensor | None,
) -> None:
    """See `pkm_lightning.ops.row_update`."""
    use_torch_threads()
    none_0, none_1, none_11 = torch.empty(0), torch.empty(1), torch.empty(1, 1)
    correction1, root_correction2 = rule.corrections
    scratch_C2D, bits_C2D = _scratch(gradient)
    _update(
        _as_numpy(table_ND.detach()),
        gradient.segments.rows_U.numpy(),
        *_reads(gradient),
        state.get("exp_avg", none_11).numpy(),
        state.get("exp_avg_sq", none_11).numpy(),
        state.get("sum", none_1).numpy(),
        state.get("last_step", none_1.int()).numpy(),
        (none_0 if row_squares_U is None else row_squares_U.contiguous()).numpy(),
        scratch_C2D,
        bits_C2D,
        KINDS.index(rule.kind),
        rule.step,
        rule.seed,
        (float(scale), rule.lr, rule.lr * rule.weight_decay, *rule.betas, rule.eps, correction1, root_correction2),
    )


def _reads(gradient: RowGradient) -> tuple[Any, ...]:
    segments = gradient.segments
    return (
        segments.order_L.numpy(),
        segments.starts_Z.numpy(),
        gradient.coefficients_L.detach().numpy(),
        gradient.sources_L.numpy(),
        _as_numpy(gradient.source_rows_XD.detach().contiguous()),
    )


def _as_numpy(values: Tensor) -> Any:
    """numpy knows no bf16: its bits, as int16."""
    return values.view(torch.int16).numpy() if values.dtype is torch.bfloat16 else values.numpy()


def _scratch(gradient: RowGradient) -> tuple[Any, Any]:
    """Two lines of fp32 a chunk, and the same memory as bits."""
    lines_C2D = torch.empty(_CHUNKS, 2, gradient.source_rows_XD.shape[1])
    return lines_C2D.numpy(), lines_C2D.view(torch.int32).numpy()


@intrinsic
def _prefetch(typing_context, array, row, column):  # type: ignore[no-untyped-def]
    """Asks the memory for the line of array[row, column], which is to be written; nothing waits for it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        place = cgutils.get_item_pointer(
            context, builder, kind, context.make_array(kind)(context, builder, arguments[0]), arguments[1:]
        )
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        )
        for_writing, keep_near, data = number(1), number(3), number(1)
        builder.call(ask, [builder.bitcast(place, pointer), for_writing, keep_near, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), code


@njit(**_KERNEL)
def _prefetch_row(values, row):  # type: ignore[no-untyped-def]
    if values.shape[0] > 1:  # what a rule does not keep has one row
        for d in range(0, values.shape[1], _CACHE_LINE // values.itemsize):
            _prefetch(values, row, d)


@njit(**_KERNEL)
def _load(values, row, out, out_bits):  # type: ignore[no-untyped-def]
    """A row as fp32; the bits of bf16 are the upper half of a float's."""
    for d in range(out.shape[0]):
        if values.itemsize == 2:
            out_bits[d] = uint32(uint16(values[row, d])) << uint32(16)
        else:
            out[d] = values[row, d]


@njit(**_KERNEL)
def _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits):  # type: ignore[no-untyped-def]
    """total <- the sum of the reads of one segment, in their order."""
    total[:] = float32(0)
    for place in range(starts[segment], starts[segment + 1]):
        read = order[place]
        coefficient = coefficients[read]
        source = sources[read]
        if source_rows.itemsize == 2:
            _load(source_rows, source, line, line_bits)
            for d in range(total.shape[0]):
                total[d] += coefficient * line[d]
        else:
            for d in range(total.shape[0]):
                total[d] += coefficient * source_rows[source, d]


# Without leave to reorder, a sum over a row is one chain of dependent additions; the order is fixed at compile time.
@njit(**_KERNEL, fastmath={"reassoc"})
def _square_sum(values):  # type: ignore[no-untyped-def]
    total = float32(0)
    for d in range(values.shape[0]):
        total += values[d] * values[d]
    return total


@njit(**_KERNEL, parallel=True)
def _squares(order, starts, coefficients, sources, source_rows, squares, scratch, bits):  # type: ignore[no-untyped-def]
    n_chunks = scratch.shape[0]
    for chunk in prange(n_chunks):
        total, line, line_bits = scratch[chunk, 0], scratch[chunk, 1], bits[chunk, 1]
        for segment in range(chunk * squares.shape[0] // n_chunks, (chunk + 1) * squares.shape[0] // n_chunks):
            _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits)
            squares[segment] = _square_sum(total)


@njit(**_KERNEL)
def _apply(  # type: ignore[no-untyped-def]
    kind, row, segment, values, grad, exp_avg, exp_avg_sq, row_sum, last_step, row_squares, step, numbers
):
    """The rule on one row, `values`, with its gradient; see rules.py. An empty `row_squares` stands for none."""
    scale, lr, decay, beta1, beta2, eps, correction1, root_correction2 = numbers
    factor, rate, eps = float32(scale), float32(lr), float32(eps)
    dim = values.shape[0]
    for d in range(dim):
        grad[d] *= factor
    if decay != 0:
        kept = float32(1 - decay)
        for d in range(dim):
            values[d] *= kept
    if kind == _SGD:
        for d in range(dim):
            values[d] -= rate * grad[d]
        return
    if kind == _ROW_ADAGRAD:
        if row_squares.shape[0] > 0:
            mean_square = row_squares[segment] * (factor * factor)
        else:
            mean_square = _square_sum(grad) / float32(dim)
        total = row_sum[row] + mean_square
        row_sum[row] = total
        rate = rate / (sqrt(total) + eps)
        for d in range(dim):
            values[d] -= rate * grad[d]
        return
    new2, root = float32(1 - beta2), float32(1 / root_correction2)
    if kind == _LAZY_ADAM:
        old1, new1, old2, rate = float32(beta1), float32(1 - beta1), float32(beta2), float32(lr / correction1)
        for d in range(dim):
            mean = old1 * exp_avg[row, d] + new1 * grad[d]
            square = old2 * exp_avg_sq[row, d] + new2 * grad[d] * grad[d]
            exp_avg[row, d], exp_avg_sq[row, d] = mean, square
            values[d] -= rate * mean / (sqrt(square) * root + eps)
        return
    old2 = float32(beta2 ** (step - last_step[row]))
    last_step[row] = step
    for d in range(dim):
        square = old2 * exp_avg_sq[row, d] + new2 * grad[d] * grad[d]
        exp_avg_sq[row, d] = square
        values[d] -= rate * grad[d] / (sqrt(square) * root + eps)


@njit(**_KERNEL)
def _store(table, row, values, value_bits, seed):  # type: ignore[no-untyped-def]
    """Writes a row back; bf16 rounds stochastically, as rounding.py says."""
    dim = values.shape[0]
    for d in range(dim):
        if table.itemsize == 2:
            word = uint32(value_bits[d])
            if (word & uint32(0x7F800000)) != uint32(0x7F800000):
                noise = uint32(row * dim + d) ^ uint32(seed)
                noise = uint32((noise ^ (noise >> uint32(16))) * uint32(0x85EBCA6B))
                noise = uint32((noise ^ (noise >> uint32(13))) * uint32(0xC2B2AE35))
                word = uint32(word + ((noise ^ (noise >> uint32(16))) & uint32(0xFFFF)))
            table[row, d] = int16(uint16(word >> uint32(16)))
        else:
            table[row, d] = values[d]


@njit(**_KERNEL, parallel=True)
def _update(  # type: ignore[no-untyped-def]
    table,
    rows,
    order,
    starts,
    coefficients,
    sources,
    source_rows,
    exp_avg,
    exp_avg_sq,
    row_sum,
    last_step,
    row_squares,
    scratch,
    bits,
    kind,
    step,
    seed,
    numbers,
):
    n_chunks = scratch.shape[0]
    for chunk in prange(n_chunks):
        total, line, line_bits = scratch[chunk, 0], scratch[chunk, 1], bits[chunk, 1]
        for segment in range(chunk * rows.shape[0] // n_chunks, (chunk + 1) * rows.shape[0] // n_chunks):
            row = rows[segment]
            if segment + _AHEAD < rows.shape[0]:
                coming = rows[segment + _AHEAD]
                _prefetch_row(table, coming)
                _prefetch_row(exp_avg, coming)
                _prefetch_row(exp_avg_sq, coming)
            _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits)
            _load(table, row, line, line_bits)
            _apply(kind, row, segment, line, total, exp_avg, exp_avg_sq, row_sum, last_step, row_squares, step, numbers)
            _store(table, row, line, line_bits, seed)
