"""The row update on a GPU: each program sums the reads of a tile of rows and columns and updates that tile.

The gradient is never written to memory, and the host does not synchronise with the device: the factor on the gradient
stays there. What a rule must know of a whole row first (its mean square, its last update) is computed before, as one
number per row.

Letters: N rows, V values per row, U segments; suffixes in kernels: R segments and C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ODD, ROWS, TABLES, TOKENS, ids
from pkm_lightning.ops.row_gradients.triton import (
    SortedReads,
    block_sizes,
    by_slices,
    segment_totals,
    sort_reads,
    tile_at,
    tile_grid,
)
from pkm_lightning.ops.row_update import RowGradient, row_gradient
from pkm_lightning.ops.row_update.factors import row_factors
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep, find_rule, new_state, rule_names

_SGD, _ROW_ADAGRAD, _LAZY_ADAM, _CATCH_UP_ADAM, _FACTORED_ADAM = (tl.constexpr(kind) for kind in range(5))
# The rules that `_update_rows` knows.
_KINDS = {"sgd": 0, "row_adagrad": 1, "lazy_adam": 2, "catch_up_adam": 3, "factored_adam": 4}
# Tiles that one program adds to the sums of its columns.
_SUMMED_TILES = 8


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    return _shared_squares(gradient, None).sum().sqrt()


def row_gradient_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    # A copy of what is shared, since ranks add their squares in place.
    return _shared_squares(gradient, weights_V).clone()


def _shared_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    """Returns the sum of g**2 of each row; without weights the norm and a rule share it."""
    if weights_V is not None:
        return _weighted_squares(gradient, weights_V)
    if "squares_U" not in gradient.shared:
        gradient.shared["squares_U"] = _weighted_squares(gradient, None)
    squares_U: Tensor = gradient.shared["squares_U"]
    return squares_U


def _weighted_squares(gradient: RowGradient, weights_V: Tensor | None) -> Tensor:
    rows_U, sizes = gradient.segments.rows_U, block_sizes(gradient.source_rows_XV.shape[1])
    if len(rows_U) == 0:
        return torch.zeros(0, dtype=torch.float32, device=rows_U.device)
    squares_U = torch.empty(len(rows_U), dtype=torch.float32, device=rows_U.device)
    with torch.cuda.device_of(squares_U):
        _squares[(triton.cdiv(len(rows_U), sizes["BLOCK_R"]),)](
            *_reads(gradient), squares_U, squares_U if weights_V is None else weights_V, len(rows_U),
            WEIGHTED=weights_V is not None, **sizes,
        )  # fmt: skip
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
    segments = gradient.segments
    if len(segments.rows_U) == 0:
        return table_NV.new_zeros(table_NV.shape[1], dtype=torch.float32) if rule.needs_column_sums else None
    scale_1 = torch.as_tensor(scale, dtype=torch.float32, device=table_NV.device).reshape(1)
    factors_FU, roots_V = row_factors(gradient, rule, step, state, scale_1, mean_squares_U, _shared_squares)
    has_factors = factors_FU.numel() > 0
    unused = scale_1
    factors_U, more_factors_U = (*factors_FU, unused)[:2]
    correction1, root_correction2 = rule.bias_corrections(step)
    n_segments, sizes = len(segments.rows_U), block_sizes(table_NV.shape[1])
    reads = _reads(gradient)
    with torch.cuda.device_of(table_NV):
        _update_rows[tile_grid(n_segments, sizes)](
            *reads, segments.rows_U, table_NV,
            state.get("exp_avg", unused), state.get("exp_avg_sq", unused),
            factors_U, more_factors_U, roots_V, scale_1,
            step.lr, step.lr * step.weight_decay, rule.betas[0], 1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1],
            rule.eps, 1 / correction1, 1 / root_correction2, step.seed, n_segments,
            KIND=_KINDS[rule.name], PER_ROW=has_factors, BY_SLICES=by_slices(reads), **sizes,
        )  # fmt: skip
    sums_V = _column_sums(gradient, more_factors_U, scale_1) if rule.needs_column_sums else None
    gradient.shared.clear()
    return sums_V


def _column_sums(gradient: RowGradient, per_square_U: Tensor, scale_1: Tensor) -> Tensor:
    """Returns the sum over the segments of per_square[u] * g**2, (V,), always added in the same order."""
    n_segments, sizes = len(per_square_U), block_sizes(gradient.source_rows_XV.shape[1])
    programs = triton.cdiv(n_segments, _SUMMED_TILES * sizes["BLOCK_R"])
    sums_PV = torch.empty(programs, sizes["V"], dtype=torch.float32, device=per_square_U.device)
    with torch.cuda.device_of(sums_PV):
        _sum_columns[programs, triton.cdiv(sizes["V"], sizes["BLOCK_V"])](
            *_reads(gradient), per_square_U, scale_1, sums_PV, n_segments, TILES=_SUMMED_TILES, **sizes
        )
    return sums_PV.sum(0)


def _reads(gradient: RowGradient) -> SortedReads:
    """Returns the sorted reads and the sums of further pieces, which all kernels of a step share."""
    if "reads" not in gradient.shared:
        gradient.shared["reads"] = sort_reads(*gradient[1:])
    reads: SortedReads = gradient.shared["reads"]
    return reads


@triton.jit(do_not_specialize=["n_segments"])
def _squares(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, squares, weights, n_segments,
    WEIGHTED: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes squares[u] = the weighted square of the sum of segment u, block of columns after block of columns."""
    u_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_R = tl.minimum(u_R, n_segments - 1)
    total_RC = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        d_C = first + tl.arange(0, BLOCK_V)
        grad_RC = segment_totals(
            coefficients, sources, source_rows, starts, partial, at_R, d_C, V, PIECE, BLOCK_R, BLOCK_V
        )  # fmt: skip
        if WEIGHTED:
            total_RC += tl.load(weights + d_C, mask=d_C < V, other=0.0)[None, :] * grad_RC * grad_RC
        else:
            total_RC += grad_RC * grad_RC
    tl.store(squares + u_R, tl.sum(total_RC, axis=1), mask=u_R < n_segments)


@triton.jit(do_not_specialize=["n_segments"])
def _sum_columns(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, per_square, scale, sums, n_segments,
    TILES: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes sums[p] = the sum of per_square * g**2 over the segments of program p, for one block of columns."""
    p = tl.program_id(0)
    d_C = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    factor = tl.load(scale)
    total_RC = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
    for tile in range(p * TILES, (p + 1) * TILES):
        u_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        at_R = tl.minimum(u_R, n_segments - 1)
        grad_RC = factor * segment_totals(
            coefficients, sources, source_rows, starts, partial, at_R, d_C, V, PIECE, BLOCK_R, BLOCK_V
        )  # fmt: skip
        per_square_R = tl.load(per_square + at_R, mask=u_R < n_segments, other=0.0)
        total_RC += per_square_R[:, None] * grad_RC * grad_RC
    tl.store(sums + p * V + d_C, tl.sum(total_RC, axis=0), mask=d_C < V)


@triton.jit
def _stored(values, row, d, table, seed, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """`values` in the table's dtype; bf16 is rounded stochastically by the hash of `rounding.py`."""
    if table.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        noise = (row * V + d).to(tl.uint32) ^ seed.to(tl.uint32)
        noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
        noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
        noise = (noise ^ (noise >> 16)) & 0xFFFF
        finite = (bits & 0x7F800000) != 0x7F800000
        upper = (tl.where(finite, bits + noise, bits) >> 16).to(tl.uint16)
        return upper.to(tl.bfloat16, bitcast=True)
    else:
        return values.to(table.dtype.element_ty)


# Triton specialises integers of 1 and multiples of 16: the seed and the number of
# segments, which change every step, would compile more kernels.
@triton.jit(do_not_specialize=["seed", "n_segments"])
def _update_rows(  # type: ignore[no-untyped-def]
    coefficients, sources, source_rows, starts, partial, rows, table,
    exp_avg, exp_avg_sq, factors, more_factors, roots, scale,
    lr, decay, beta1, new1, beta2, new2, eps, over1, over_root2, seed, n_segments,
    KIND: tl.constexpr, PER_ROW: tl.constexpr, BY_SLICES: tl.constexpr,
    V: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Updates BLOCK_V columns of BLOCK_R rows: gradient, rule, write.

    The equations stand in `rules/`.
    """
    u_R, d_C = tile_at(tl.program_id(0), n_segments, BY_SLICES, V, BLOCK_R, BLOCK_V)
    # The last tile reads its last segment several times, and writes it once.
    at_R = tl.minimum(u_R, n_segments - 1)
    u, d = at_R[:, None], d_C[None, :]
    row = tl.where(u_R < n_segments, tl.load(rows + at_R), -1)[:, None].to(tl.int64)
    grad = segment_totals(coefficients, sources, source_rows, starts, partial, at_R, d_C, V, PIECE, BLOCK_R, BLOCK_V)
    grad *= tl.load(scale)
    live = (d < V) & (row >= 0)
    at = row * V + d
    # One kernel for all rules, because they share the loads and stores of a row; KIND selects one at compile time.
    values = tl.load(table + at, mask=live, other=0.0).to(tl.float32)
    values -= decay * values
    if KIND == _SGD:
        values -= lr * grad
    elif KIND == _ROW_ADAGRAD:
        values -= lr * tl.load(factors + u) * grad
    elif KIND == _FACTORED_ADAM:
        root = tl.load(factors + u) * tl.load(roots + d, mask=d < V, other=0.0)
        values -= lr * grad / (root + eps)
    elif KIND == _LAZY_ADAM:
        if PER_ROW:
            over1 = 1 / tl.load(factors + u)
            over_root2 = 1 / tl.load(more_factors + u)
        mean = beta1 * tl.load(exp_avg + at, mask=live, other=0.0) + new1 * grad
        square = beta2 * tl.load(exp_avg_sq + at, mask=live, other=0.0) + new2 * grad * grad
        tl.store(exp_avg + at, mean, mask=live)
        tl.store(exp_avg_sq + at, square, mask=live)
        values -= lr * over1 * mean / (tl.sqrt(square) * over_root2 + eps)
    else:
        missed_decay = tl.load(factors + u)
        square = missed_decay * tl.load(exp_avg_sq + at, mask=live, other=0.0) + new2 * grad * grad
        tl.store(exp_avg_sq + at, square, mask=live)
        values -= lr * grad / (tl.sqrt(square) * over_root2 + eps)
    tl.store(table + at, _stored(values, row, d, table, seed, V), mask=live)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    for dim, dtype in TABLES:
        _launch(find_rule("lazy_adam")(), dim, dtype)
    for name in rule_names():
        for dim, dtype in ((160, torch.float32), (ODD, torch.bfloat16)):
            _launch(find_rule(name)(betas=(0.0, 0.9)), dim, dtype)
    _launch(find_rule("lazy_adam")(bias_correction="row"), ODD, torch.bfloat16)  # type: ignore[call-arg]


def _launch(rule: RowRule, dim: int, dtype: torch.dtype) -> None:
    table_NV, reads = torch.empty(ROWS, dim, dtype=dtype), TOKENS * 16
    # Each read has a source row of its own, as where rows are read one by one.
    gradient = row_gradient(ROWS, ids(reads), torch.empty(reads), ids(reads), torch.empty(reads, dim, dtype=dtype))
    row_gradient_norm(gradient)
    state, step = new_state(rule, table_NV), UpdateStep(lr=0.1, number=3)
    row_update(table_NV, gradient, rule, step, state, 1.0, None)
