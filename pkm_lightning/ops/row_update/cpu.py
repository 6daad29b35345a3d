"""The row update in numba, as one pass over the rows that were read: sum the reads, apply the rule, write the row.

The sum of a row is kept in a scratch line that stays in the first-level cache; row and state are read and written once.
Rows follow each other in ascending order, so that hardware often meets the next row where it looks for it anyway; the
first lines of coming rows are requested ahead all the same. For the norm the sum is computed a second time instead of
being stored: reading is cheaper than writing. Where backward needs the gradients of the coefficients, one pass over the
rows gives both.

Letters: N rows, V values per row, U rows that were read, L reads, X source rows, C chunks, Z = U + 1 limits, F numbers
per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from numba import float32, njit, uint16, uint32
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_intrinsics import float_bits, item_bytes, prefetch, widened
from pkm_lightning.ops.numba_kernels import ALL, CALLED, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.row_update.factors import no_factors, row_factors
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient

# A constant, so that the limits of the chunks do not depend on the number of threads.
_CHUNKS = 64
_ROWS_AHEAD = 4
_CACHE_LINE = 64  # bytes
# At the start of a row. Hardware sees the stream and fetches the rest of a longer row by itself, with more requests in
# flight than instructions can have.
_FETCHED_BYTES = 256
# Rules that compute their factors in the pass over the rows, since one thread has a whole row.
_IN_ONE_PASS = ("row_adagrad", "catch_up_adam")


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    # The order of the sum depends on the number of threads; in fp64 that does not change the fp32 result.
    return _shared_squares(gradient).double().sum().sqrt().float()


def row_gradient_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    # A copy of what is shared, since ranks add their squares in place.
    return _shared_squares(gradient).clone() if weights_V is None else _weighted_squares(gradient, weights_V)


def _shared_squares(gradient: RowGradient) -> Tensor:
    """Returns the sum of g**2 of each row, which backward may have computed."""
    if "cpu_squares_U" not in gradient.shared:
        gradient.shared["cpu_squares_U"] = _weighted_squares(gradient, None)
    squares_U: Tensor = gradient.shared["cpu_squares_U"]
    return squares_U


def _weighted_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    use_torch_threads()
    roots_V = torch.empty(0, dtype=torch.float32) if weights_V is None else weights_V.sqrt()
    squares_U = torch.empty(len(gradient.segments.rows_U), dtype=torch.float32)
    _squares(*_reads(gradient), numpy_view(squares_U), numpy_view(roots_V), _scratch(gradient), ALL)
    return squares_U


def row_gradient_dots(table_NV: Tensor, gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_dots`, and the squares of the rows in the same pass."""
    use_torch_threads()
    dots_L = torch.empty(len(gradient.coefficients_L), dtype=torch.float32)
    squares_U = torch.empty(len(gradient.segments.rows_U), dtype=torch.float32)
    _dots_and_squares(
        numpy_view(table_NV),
        numpy_view(gradient.segments.rows_U),
        numpy_view(gradient.segments.order_L),
        *_reads(gradient),
        numpy_view(dots_L),
        numpy_view(squares_U),
        _scratch(gradient),
        ALL,
    )
    gradient.shared["cpu_squares_U"] = squares_U
    return dots_L


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
    factors_FU, roots_V = no_factors(gradient)
    if rule.name not in _IN_ONE_PASS:
        factors_FU, roots_V = row_factors(gradient, rule, step, state, scale, mean_squares_U, row_gradient_squares)
    if rule.name == "row_adagrad" and mean_squares_U is not None:
        factors_FU = mean_squares_U.unsqueeze(0)
    sums_CV = torch.zeros(_CHUNKS, table_NV.shape[1] if rule.needs_column_sums else 0, dtype=torch.float32)
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
    by_row = [state[name].unsqueeze(-1) for name in ("sum", "last_step") if name in state]
    more = {"factored_adam": (roots_V, sums_CV)}.get(rule.name, ())
    _KINDS[rule.name](
        numpy_view(table_NV),
        numpy_view(gradient.segments.rows_U),
        *_reads(gradient),
        *map(numpy_view, (*moments, *by_row, factors_FU.contiguous(), *more)),
        _scratch(gradient),
        step.seed,
        _numbers(rule, step, float(scale)),
        ALL,
    )
    # The state and the table have changed: nothing of this step may serve another.
    gradient.shared.clear()
    return sums_CV.sum(0) if rule.needs_column_sums else None


def _numbers(rule: RowRule, step: UpdateStep, scale: float) -> tuple[float, ...]:
    """Returns the numbers that all kernels take, in fp64: differences from 1 are rounded after they are computed."""
    correction1, root_correction2 = rule.bias_corrections(step)
    remaining = 1 - step.lr * step.weight_decay
    return scale, step.lr, remaining, *rule.betas, rule.eps, correction1, root_correction2, float(step.number)


def _reads(gradient: RowGradient) -> tuple[Any, ...]:
    """Returns the limits of the segments, the coefficients and sources in their order, and the source rows."""
    if "cpu_reads" not in gradient.shared:
        order_L, _, starts_Z = gradient.segments
        factors = gradient.coefficients_L.detach(), gradient.sources_L
        # One loop for both: each index of torch is a pass of its own, with checks.
        sorted_factors = [torch.empty_like(factor_L) for factor_L in factors]
        _take(*map(numpy_view, (order_L, *factors, *sorted_factors)))
        tensors = starts_Z, *sorted_factors, gradient.source_rows_XV.contiguous()
        gradient.shared["cpu_reads"] = tuple(map(numpy_view, tensors))
    reads: tuple[Any, ...] = gradient.shared["cpu_reads"]
    return reads


def _scratch(gradient: RowGradient) -> Any:
    """Returns one line of fp32 per chunk."""
    return numpy_view(torch.empty(_CHUNKS, gradient.source_rows_XV.shape[1], dtype=torch.float32))


@njit(**KERNEL)
def _take(order, coefficients, sources, sorted_coefficients, sorted_sources):  # type: ignore[no-untyped-def]
    for place in range(order.shape[0]):
        read = order[place]
        sorted_coefficients[place], sorted_sources[place] = coefficients[read], sources[read]


@njit(**CALLED)
def _request(values, rows, place):  # type: ignore[no-untyped-def]
    """Requests the first lines of the row rows[place], of which there is none after the last place."""
    if place < rows.shape[0]:
        for v in range(
            0, min(values.shape[1], _FETCHED_BYTES // item_bytes(values)), _CACHE_LINE // item_bytes(values)
        ):
            prefetch(values, rows[place], v)


@njit(**CALLED)
def _add_reads(segment, starts, coefficients, sources, source_rows, total):  # type: ignore[no-untyped-def]
    """Computes total <- the sum of the reads of one segment, in their order."""
    first = starts[segment]
    for place in range(first, starts[segment + 1]):
        _request(source_rows, sources, place + _ROWS_AHEAD)
        coefficient, source_row = coefficients[place], source_rows[sources[place]]
        if place == first:
            for v in range(total.shape[0]):
                total[v] = coefficient * widened(source_row[v])
        else:
            for v in range(total.shape[0]):
                total[v] += coefficient * widened(source_row[v])
    if starts[segment + 1] == first:
        total[:] = float32(0)


# Unless additions may be reordered, the sum over a row is one chain of dependent additions and cannot be vectorised.
# The compiler fixes the new order, so two runs still give the same bits.
@njit(**CALLED, fastmath={"reassoc"})
def _square_sum(values):  # type: ignore[no-untyped-def]
    total = float32(0)
    for v in range(values.shape[0]):
        total += values[v] * values[v]
    return total


@njit(**CALLED)
def _store(row_values, v, value, place, seed):  # type: ignore[no-untyped-def]
    """Writes one value; the bits of bf16 are rounded stochastically by the hash of `rounding.py`."""
    if item_bytes(row_values) == 2:
        word = uint32(float_bits(value))
        # Infinities and NaNs are cut off instead: the noise could carry into the sign of a NaN.
        if (word & uint32(0x7F800000)) != uint32(0x7F800000):
            noise = uint32(place) ^ uint32(seed)
            noise = uint32((noise ^ (noise >> uint32(16))) * uint32(0x85EBCA6B))
            noise = uint32((noise ^ (noise >> uint32(13))) * uint32(0xC2B2AE35))
            word = uint32(word + ((noise ^ (noise >> uint32(16))) & uint32(0xFFFF)))
        row_values[v] = uint16(word >> uint32(16))
    else:
        row_values[v] = value


@njit(**KERNEL)
def _squares(starts, coefficients, sources, source_rows, squares, roots, scratch, worker):  # type: ignore[no-untyped-def]
    """Computes squares[u] = the sum of the squares of roots * the sum of segment u; empty roots stand for ones."""
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * squares.shape[0] // _CHUNKS, (chunk + 1) * squares.shape[0] // _CHUNKS):
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            for v in range(roots.shape[0]):
                total[v] *= roots[v]
            squares[segment] = _square_sum(total)


@njit(**KERNEL, fastmath={"reassoc", "contract"})
def _dots_and_squares(  # type: ignore[no-untyped-def]
    table, rows, order, starts, coefficients, sources, source_rows, dots, squares, scratch, worker
):
    """Computes dots[l] = <row, source row> of read l, and squares[u] of segment u; each row is read once."""
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            _request(table, rows, segment + _ROWS_AHEAD)
            row = table[rows[segment]]
            for v in range(total.shape[0]):
                total[v] = float32(0)
            for place in range(starts[segment], starts[segment + 1]):
                _request(source_rows, sources, place + _ROWS_AHEAD)
                coefficient, source_row, dot = coefficients[place], source_rows[sources[place]], float32(0)
                for v in range(total.shape[0]):
                    value = widened(source_row[v])
                    dot += value * widened(row[v])
                    total[v] += coefficient * value
                dots[order[place]] = dot
            squares[segment] = _square_sum(total)


# One kernel per rule, so that a run compiles those of its own; the equations stand in `rules/`.
@njit(**KERNEL)
def _sgd(  # type: ignore[no-untyped-def]
    table, rows, starts, coefficients, sources, source_rows, factors, scratch, seed, numbers, worker
):
    factor, rate, remaining = float32(numbers[0]), float32(numbers[1]), float32(numbers[2])
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            _request(table, rows, segment + _ROWS_AHEAD)
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            _descend(table[rows[segment]], total, factor, rate, remaining, rows[segment], seed)


@njit(**CALLED)
def _descend(values, grad, factor, rate, remaining, row, seed):  # type: ignore[no-untyped-def]
    dim = values.shape[0]
    for v in range(dim):
        _store(values, v, remaining * widened(values[v]) - rate * (factor * grad[v]), row * dim + v, seed)


@njit(**KERNEL)
def _row_adagrad(  # type: ignore[no-untyped-def]
    table, rows, starts, coefficients, sources, source_rows, row_sums, factors, scratch, seed, numbers, worker
):
    """Takes the mean squares of whole rows as `factors`, where these are parts of them."""
    factor, lr, remaining, eps = float32(numbers[0]), float32(numbers[1]), float32(numbers[2]), float32(numbers[5])
    dim = table.shape[1]
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            row = rows[segment]
            _request(table, rows, segment + _ROWS_AHEAD)
            _request(row_sums, rows, segment + _ROWS_AHEAD)
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            if factors.shape[1] > 0:
                mean_square = factors[0, segment]
            else:
                mean_square = _square_sum(total) / float32(dim)
            row_sum = row_sums[row, 0] + mean_square * (factor * factor)
            row_sums[row, 0] = row_sum
            _descend(table[row], total, factor, lr / (sqrt(row_sum) + eps), remaining, row, seed)


@njit(**KERNEL)
def _lazy_adam(  # type: ignore[no-untyped-def]
    table,
    rows,
    starts,
    coefficients,
    sources,
    source_rows,
    exp_avg,
    exp_avg_sq,
    factors,
    scratch,
    seed,
    numbers,
    worker,
):
    """Takes the bias corrections of each row as `factors`, where they are counted by row."""
    scale, lr, decayed, beta1, beta2, eps_, correction1, root_correction2, _ = numbers
    factor, remaining, eps = float32(scale), float32(decayed), float32(eps_)
    old1, new1, old2, new2 = float32(beta1), float32(1 - beta1), float32(beta2), float32(1 - beta2)
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            row = rows[segment]
            _request(table, rows, segment + _ROWS_AHEAD)
            _request(exp_avg, rows, segment + _ROWS_AHEAD)
            _request(exp_avg_sq, rows, segment + _ROWS_AHEAD)
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            rate, root = float32(lr / correction1), float32(1 / root_correction2)
            if factors.shape[1] > 0:
                rate, root = float32(lr) / factors[0, segment], float32(1) / factors[1, segment]
            values, means, squares, place = table[row], exp_avg[row], exp_avg_sq[row], row * table.shape[1]
            for v in range(total.shape[0]):
                grad = factor * total[v]
                mean, square = old1 * means[v] + new1 * grad, old2 * squares[v] + new2 * grad * grad
                means[v], squares[v] = mean, square
                value = remaining * widened(values[v]) - rate * mean / (sqrt(square) * root + eps)
                _store(values, v, value, place + v, seed)


@njit(**KERNEL)
def _catch_up_adam(  # type: ignore[no-untyped-def]
    table, rows, starts, coefficients, sources, source_rows, exp_avg_sq, last_step, factors, scratch, seed,
    numbers, worker,
):  # fmt: skip
    scale, lr, decayed, _, beta2, eps_, _, root_correction2, number = numbers
    factor, rate, remaining, eps = float32(scale), float32(lr), float32(decayed), float32(eps_)
    root, new2 = float32(1 / root_correction2), float32(1 - beta2)
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total = scratch[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            row = rows[segment]
            _request(table, rows, segment + _ROWS_AHEAD)
            _request(exp_avg_sq, rows, segment + _ROWS_AHEAD)
            _request(last_step, rows, segment + _ROWS_AHEAD)
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            # Steps that did not read the row would have decayed its second moment.
            old2 = float32(beta2 ** (number - last_step[row, 0]))
            last_step[row, 0] = number
            values, squares, place = table[row], exp_avg_sq[row], row * table.shape[1]
            for v in range(total.shape[0]):
                grad = factor * total[v]
                square = old2 * squares[v] + new2 * grad * grad
                squares[v] = square
                value = remaining * widened(values[v]) - rate * grad / (sqrt(square) * root + eps)
                _store(values, v, value, place + v, seed)


@njit(**KERNEL)
def _factored_adam(  # type: ignore[no-untyped-def]
    table, rows, starts, coefficients, sources, source_rows, factors, roots, sums, scratch, seed, numbers, worker
):
    """Takes the root of each row's factor and 1 / q as `factors`; adds g**2 / q to the sums of the chunk."""
    factor, rate, remaining, eps = float32(numbers[0]), float32(numbers[1]), float32(numbers[2]), float32(numbers[5])
    first_chunk, last_chunk = share(_CHUNKS, worker)
    for chunk in range(first_chunk, last_chunk):
        total, sum_of_chunk = scratch[chunk], sums[chunk]
        for segment in range(chunk * rows.shape[0] // _CHUNKS, (chunk + 1) * rows.shape[0] // _CHUNKS):
            row = rows[segment]
            _request(table, rows, segment + _ROWS_AHEAD)
            _add_reads(segment, starts, coefficients, sources, source_rows, total)
            row_root, per_square = factors[0, segment], factors[1, segment]
            values, place = table[row], row * table.shape[1]
            for v in range(total.shape[0]):
                grad = factor * total[v]
                sum_of_chunk[v] += per_square * grad * grad
                value = remaining * widened(values[v]) - rate * grad / (row_root * roots[v] + eps)
                _store(values, v, value, place + v, seed)


# The rules that have a kernel.
_KINDS = {
    "sgd": _sgd,
    "row_adagrad": _row_adagrad,
    "lazy_adam": _lazy_adam,
    "catch_up_adam": _catch_up_adam,
    "factored_adam": _factored_adam,
}
