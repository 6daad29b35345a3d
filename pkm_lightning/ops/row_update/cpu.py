"""The row update in numba, as one pass over the rows that were read: sum the reads, apply the rule, write the row back.

The sum of a row is kept in a scratch line that stays in the first-level cache. Row and state are read and written once.
They are prefetched some rows ahead, because hardware cannot predict which row comes next: this halves the time of lazy
Adam. So are source rows that belong to one read each: this halves the time of the norm. For the norm the sum is
computed a second time instead of being stored: reading is cheaper than writing.

Letters: N rows, V values per row, U rows that were read, L reads, C chunks, which have two scratch lines each.
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
from pkm_lightning.ops.row_update.factors import no_factors, row_factors
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient

# The rules that `_apply` has a branch for. Kernels that call each other stay in one file: numba's cache does not notice
# that a kernel of another file has changed.
_SGD, _ROW_ADAGRAD, _LAZY_ADAM, _CATCH_UP_ADAM, _FACTORED_ADAM = range(5)
_KINDS = {
    "sgd": _SGD,
    "row_adagrad": _ROW_ADAGRAD,
    "lazy_adam": _LAZY_ADAM,
    "catch_up_adam": _CATCH_UP_ADAM,
    "factored_adam": _FACTORED_ADAM,
}
# Branches that compute their factors in the pass over the rows, since one thread has a whole row.
_IN_ONE_PASS = (_ROW_ADAGRAD, _CATCH_UP_ADAM)
# A constant, so that the limits of the chunks do not depend on the number of threads.
_CHUNKS = 64
_PREFETCHED_ROWS = 4
_CACHE_LINE = 64  # bytes
# Python's error model tests every division for zero, which prevents the vectorisation of a loop.
_KERNEL = {"cache": True, "nogil": True, "error_model": "numpy"}


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    # The order of the sum depends on the number of threads; in fp64 that does not change the fp32 result.
    return row_gradient_squares(gradient, None).double().sum().sqrt().float()


def row_gradient_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    use_torch_threads()
    roots_V = torch.empty(0, dtype=torch.float32) if weights_V is None else weights_V.sqrt()
    squares_U = torch.empty(len(gradient.segments.rows_U), dtype=torch.float32)
    scratch_C2V, bits_C2V = _scratch(gradient)
    _squares(*_reads(gradient), squares_U.numpy(), roots_V.numpy(), scratch_C2V, bits_C2V)
    return squares_U


def row_update(
    table_NV: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    mean_squares_U: Tensor | None,
) -> Tensor | None:
    """Updates the rows; returns the sums that `RowRule.update_columns` takes, where the rule needs them."""
    use_torch_threads()
    none_0, none_1, none_11 = (torch.empty(shape, dtype=torch.float32) for shape in (0, 1, (1, 1)))
    correction1, root_correction2 = rule.bias_corrections(step)
    kind, (factors_FU, roots_V) = _KINDS[rule.name], no_factors(gradient)
    if kind not in _IN_ONE_PASS:
        factors_FU, roots_V = row_factors(gradient, rule, step, state, scale, mean_squares_U, row_gradient_squares)
    sums_CV = torch.zeros(_CHUNKS, table_NV.shape[1] if rule.needs_column_sums else 0, dtype=torch.float32)
    scratch_C2V, bits_C2V = _scratch(gradient)
    _update(
        _as_numpy(table_NV.detach()),
        gradient.segments.rows_U.numpy(),
        *_reads(gradient),
        state.get("exp_avg", none_11).numpy(),
        state.get("exp_avg_sq", none_11).numpy(),
        state.get("sum", none_1).numpy(),
        state.get("last_step", none_1.int()).numpy(),
        (none_0 if mean_squares_U is None else mean_squares_U.contiguous()).numpy(),
        factors_FU.contiguous().numpy(),
        roots_V.numpy(),
        sums_CV.numpy(),
        scratch_C2V,
        bits_C2V,
        kind,
        step.number,
        step.seed,
        (float(scale), step.lr, step.lr * step.weight_decay, *rule.betas, rule.eps, correction1, root_correction2),
    )
    return sums_CV.sum(0) if rule.needs_column_sums else None


def _reads(gradient: RowGradient) -> tuple[Any, ...]:
    segments = gradient.segments
    return (
        segments.order_L.numpy(),
        segments.starts_Z.numpy(),
        gradient.coefficients_L.detach().numpy(),
        gradient.sources_L.numpy(),
        _as_numpy(gradient.source_rows_XV.detach().contiguous()),
    )


def _as_numpy(values: Tensor) -> Any:
    """A numpy view; of bf16, which numpy lacks, the bits as int16."""
    return values.view(torch.int16).numpy() if values.dtype is torch.bfloat16 else values.numpy()


def _scratch(gradient: RowGradient) -> tuple[Any, Any]:
    """Two lines of fp32 per chunk, and the same memory as bits."""
    lines_C2V = torch.empty(_CHUNKS, 2, gradient.source_rows_XV.shape[1], dtype=torch.float32)
    return lines_C2V.numpy(), lines_C2V.view(torch.int32).numpy()


@intrinsic
def _prefetch(typing_context, array, row, column):  # type: ignore[no-untyped-def]
    """Prefetches the cache line of array[row, column] for writing, without waiting for it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        place = cgutils.get_item_pointer(
            context, builder, kind, context.make_array(kind)(context, builder, arguments[0]), arguments[1:]
        )
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        )
        for_writing, keep_near, data = number(1), number(3), number(1)
        builder.call(prefetch, [builder.bitcast(place, pointer), for_writing, keep_near, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), code


@njit(**_KERNEL)
def _prefetch_row(values, row):  # type: ignore[no-untyped-def]
    if values.shape[0] > 1:  # a state that the rule lacks is passed as one row
        for d in range(0, values.shape[1], _CACHE_LINE // values.itemsize):
            _prefetch(values, row, d)


@njit(**_KERNEL)
def _load(values, row, out, out_bits):  # type: ignore[no-untyped-def]
    """Loads a row as fp32; the bits of bf16 are the upper half of those of fp32."""
    for d in range(out.shape[0]):
        if values.itemsize == 2:
            out_bits[d] = uint32(uint16(values[row, d])) << uint32(16)
        else:
            out[d] = values[row, d]


@njit(**_KERNEL)
def _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits):  # type: ignore[no-untyped-def]
    """Computes total <- the sum of the reads of one segment, in their order."""
    coming = segment + _PREFETCHED_ROWS
    # Source rows that many reads share are in the cache.
    if 2 * source_rows.shape[0] > order.shape[0] and coming + 1 < starts.shape[0] and starts[coming] < order.shape[0]:
        _prefetch_row(source_rows, sources[order[starts[coming]]])
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


# Unless additions may be reordered, the sum over a row is one chain of dependent additions and cannot be vectorised.
# The compiler fixes the new order, so two runs still give the same bits.
@njit(**_KERNEL, fastmath={"reassoc"})
def _square_sum(values):  # type: ignore[no-untyped-def]
    total = float32(0)
    for d in range(values.shape[0]):
        total += values[d] * values[d]
    return total


@njit(**_KERNEL, parallel=True)
def _squares(order, starts, coefficients, sources, source_rows, squares, roots, scratch, bits):  # type: ignore[no-untyped-def]
    """Computes squares[u] = the sum of the squares of roots * the sum of segment u; empty roots stand for ones."""
    n_chunks = scratch.shape[0]
    for chunk in prange(n_chunks):
        total, line, line_bits = scratch[chunk, 0], scratch[chunk, 1], bits[chunk, 1]
        for segment in range(chunk * squares.shape[0] // n_chunks, (chunk + 1) * squares.shape[0] // n_chunks):
            _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits)
            for d in range(roots.shape[0]):
                total[d] *= roots[d]
            squares[segment] = _square_sum(total)


@njit(**_KERNEL)
def _apply(  # type: ignore[no-untyped-def]
    kind, row, segment, values, grad, exp_avg, exp_avg_sq, row_sum, last_step, mean_squares, factors, roots, sums,
    number, numbers,
):  # fmt: skip
    """Applies the rule to one row, `values`, with its gradient; the equations stand in `rules/`.

    An empty `mean_squares` stands for None; `factors` and `roots` are those of `factors.py`. Adds to `sums`, which
    belongs to the chunk, what the rule sums over rows.
    """
    scale, lr, decay, beta1, beta2, eps, correction1, root_correction2 = numbers
    factor, rate, eps = float32(scale), float32(lr), float32(eps)
    dim = values.shape[0]
    for d in range(dim):
        grad[d] *= factor
    if decay != 0:
        remaining = float32(1 - decay)
        for d in range(dim):
            values[d] *= remaining
    if kind == _SGD:
        for d in range(dim):
            values[d] -= rate * grad[d]
        return
    if kind == _ROW_ADAGRAD:
        if mean_squares.shape[0] > 0:
            mean_square = mean_squares[segment] * (factor * factor)
        else:
            mean_square = _square_sum(grad) / float32(dim)
        total = row_sum[row] + mean_square
        row_sum[row] = total
        rate = rate / (sqrt(total) + eps)
        for d in range(dim):
            values[d] -= rate * grad[d]
        return
    if kind == _FACTORED_ADAM:
        row_root, per_square = factors[0, segment], factors[1, segment]
        for d in range(dim):
            values[d] -= rate * grad[d] / (row_root * roots[d] + eps)
            sums[d] += per_square * grad[d] * grad[d]
        return
    new2, root = float32(1 - beta2), float32(1 / root_correction2)
    if kind == _LAZY_ADAM:
        old1, new1, old2, rate = float32(beta1), float32(1 - beta1), float32(beta2), float32(lr / correction1)
        if factors.shape[1] > 0:
            rate, root = float32(lr) / factors[0, segment], float32(1) / factors[1, segment]
        for d in range(dim):
            mean = old1 * exp_avg[row, d] + new1 * grad[d]
            square = old2 * exp_avg_sq[row, d] + new2 * grad[d] * grad[d]
            exp_avg[row, d], exp_avg_sq[row, d] = mean, square
            values[d] -= rate * mean / (sqrt(square) * root + eps)
        return
    old2 = float32(beta2 ** (number - last_step[row]))
    last_step[row] = number
    for d in range(dim):
        square = old2 * exp_avg_sq[row, d] + new2 * grad[d] * grad[d]
        exp_avg_sq[row, d] = square
        values[d] -= rate * grad[d] / (sqrt(square) * root + eps)


@njit(**_KERNEL)
def _store(table, row, values, value_bits, seed):  # type: ignore[no-untyped-def]
    """Writes a row back; bf16 is rounded stochastically by the hash of `rounding.py`."""
    dim = values.shape[0]
    for d in range(dim):
        if table.itemsize == 2:
            word = uint32(value_bits[d])
            # Infinities and NaNs are cut off instead: the noise could carry into the sign of a NaN.
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
    mean_squares,
    factors,
    roots,
    sums,
    scratch,
    bits,
    kind,
    number,
    seed,
    numbers,
):
    n_chunks = scratch.shape[0]
    # As arrays of rows, which is what `_prefetch_row` takes.
    row_sum_N1, last_step_N1 = row_sum.reshape((-1, 1)), last_step.reshape((-1, 1))
    for chunk in prange(n_chunks):
        total, line, line_bits = scratch[chunk, 0], scratch[chunk, 1], bits[chunk, 1]
        for segment in range(chunk * rows.shape[0] // n_chunks, (chunk + 1) * rows.shape[0] // n_chunks):
            row = rows[segment]
            if segment + _PREFETCHED_ROWS < rows.shape[0]:
                coming = rows[segment + _PREFETCHED_ROWS]
                _prefetch_row(table, coming)
                _prefetch_row(exp_avg, coming)
                _prefetch_row(exp_avg_sq, coming)
                _prefetch_row(row_sum_N1, coming)
                _prefetch_row(last_step_N1, coming)
            _add_reads(segment, order, starts, coefficients, sources, source_rows, total, line, line_bits)
            _load(table, row, line, line_bits)
            _apply(
                kind, row, segment, line, total, exp_avg, exp_avg_sq, row_sum, last_step, mean_squares, factors, roots,
                sums[chunk], number, numbers,
            )  # fmt: skip
            _store(table, row, line, line_bits, seed)
