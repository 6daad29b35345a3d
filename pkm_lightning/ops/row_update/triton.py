"""The row update on a GPU: each program sums the reads of one row in a block of columns and updates that block.

The gradient is never written to memory, and the host does not synchronise with the device: the factor on the gradient
stays there. What a rule must know of a whole row first (its mean square, its last update) is computed before, as one
number per row.

Letters: N rows, V values per row, U segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.row_gradients.triton import block_sizes, further_pieces, segment_total
from pkm_lightning.ops.row_update.rules import RowRule, UpdateStep

if TYPE_CHECKING:
    from pkm_lightning.ops.row_update import RowGradient

_SGD, _ROW_ADAGRAD, _LAZY_ADAM, _CATCH_UP_ADAM = (tl.constexpr(kind) for kind in range(4))
_KINDS = {"sgd": 0, "row_adagrad": 1, "lazy_adam": 2, "catch_up_adam": 3}  # the rules that `_update_rows` knows


def row_gradient_norm(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_norm`."""
    return row_gradient_squares(gradient).sum().sqrt()


def row_gradient_squares(gradient: RowGradient) -> Tensor:
    """Computes `pkm_lightning.ops.row_update.row_gradient_squares`."""
    segments = gradient.segments
    squares_U = torch.zeros(len(segments.rows_U), dtype=torch.float32, device=segments.rows_U.device)
    if len(squares_U):
        reads, pieces, blocks = _launch_arguments(gradient)
        sizes = block_sizes(gradient.source_rows_XV.shape[1])
        with torch.cuda.device_of(squares_U):
            _squares[(len(squares_U),)](*reads, segments.starts_Z, *pieces, squares_U, BLOCKS=blocks, **sizes)
    return squares_U


def row_update(
    table_NV: Tensor,
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale: Tensor | float,
    mean_squares_U: Tensor | None,
) -> None:
    """Computes `pkm_lightning.ops.row_update.row_update`."""
    segments = gradient.segments
    if len(segments.rows_U) == 0:
        return
    scale_1 = torch.as_tensor(scale, dtype=torch.float32, device=table_NV.device).reshape(1)
    factor_U = _row_factors(gradient, rule, step, state, scale_1, mean_squares_U)
    unused = scale_1
    reads, pieces, blocks = _launch_arguments(gradient)
    correction1, root_correction2 = rule.bias_corrections(step)
    with torch.cuda.device_of(table_NV):
        _update_rows[len(segments.rows_U), blocks](
            *reads, segments.starts_Z, segments.rows_U, *pieces, table_NV,
            state.get("exp_avg", unused), state.get("exp_avg_sq", unused), factor_U, scale_1,
            step.lr, step.lr * step.weight_decay, rule.betas[0], 1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1],
            rule.eps, 1 / correction1, 1 / root_correction2, step.seed,
            KIND=_KINDS[rule.name], **block_sizes(table_NV.shape[1]),
        )  # fmt: skip


def _row_factors(
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    scale_1: Tensor,
    mean_squares_U: Tensor | None,
) -> Tensor:
    """The number per row that a rule computes before the kernel runs, (U,); updates the states of that size."""
    rows_U = gradient.segments.rows_U.long()
    # Padding (row -1) is added to row 0 as a zero: a boolean index would make the host wait for the number of rows.
    live_U, at_U = rows_U >= 0, rows_U.clamp(min=0)
    if rule.name == "row_adagrad":
        if mean_squares_U is None:
            means_U = row_gradient_squares(gradient) * scale_1.square() / gradient.source_rows_XV.shape[1]
        else:
            means_U = mean_squares_U * scale_1.square()
        state["sum"].index_add_(0, at_U, torch.where(live_U, means_U, 0.0))
        return 1 / (state["sum"][at_U].sqrt() + rule.eps)
    if rule.name == "catch_up_adam":
        missed_U = step.number - state["last_step"][at_U]
        steps_U = torch.where(live_U, step.number, 0).int()
        state["last_step"].scatter_reduce_(0, at_U, steps_U, "amax")
        return torch.pow(torch.full_like(scale_1, rule.betas[1]), missed_U)
    return scale_1


def _launch_arguments(gradient: RowGradient) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """The tensors that every kernel reads, the sums of further pieces, and the number of blocks of columns."""
    _, segments, coefficients_L, sources_L, source_rows_XV = gradient
    reads = segments.order_L, coefficients_L, sources_L, source_rows_XV.contiguous()
    dim = source_rows_XV.shape[1]
    pieces = further_pieces(segments, coefficients_L, sources_L, reads[-1])
    return reads, pieces, triton.cdiv(dim, block_sizes(dim)["BLOCK_V"])


@triton.jit
def _squares(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, further, ends, partial, squares,
    BLOCKS: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes squares[u] = the square of the sum of segment u, block of columns after block of columns."""
    u = tl.program_id(0)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for block in range(BLOCKS):
        d = block * BLOCK_V + tl.arange(0, BLOCK_V)
        grad = segment_total(
            order, coefficients, sources, source_rows, starts, further, ends, partial, u, d,
            V, PIECE, BLOCK_P, BLOCK_V,
        )  # fmt: skip
        total += grad * grad
    tl.store(squares + u, tl.sum(total, axis=0))


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


# Triton specialises integers of 1 and multiples of 16: the seed, which changes every step, would compile more kernels.
@triton.jit(do_not_specialize=["seed"])
def _update_rows(  # type: ignore[no-untyped-def]
    order, coefficients, sources, source_rows, starts, rows, further, ends, partial, table,
    exp_avg, exp_avg_sq, factors, scale, lr, decay, beta1, new1, beta2, new2, eps, over1, over_root2, seed,
    KIND: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Updates one block of columns of one row: gradient, rule, write; the equations stand in `rules/`."""
    u = tl.program_id(0)
    row = tl.load(rows + u).to(tl.int64)
    if row >= 0:
        d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_row = d < V
        grad = segment_total(
            order, coefficients, sources, source_rows, starts, further, ends, partial, u, d,
            V, PIECE, BLOCK_P, BLOCK_V,
        ) * tl.load(scale)  # fmt: skip
        at = row * V + d
        # One kernel for all rules, because they share the loads and stores of a row; KIND selects one at compile time.
        values = tl.load(table + at, mask=in_row, other=0.0).to(tl.float32)
        values -= decay * values
        if KIND == _SGD:
            values -= lr * grad
        elif KIND == _ROW_ADAGRAD:
            values -= lr * tl.load(factors + u) * grad
        elif KIND == _LAZY_ADAM:
            mean = beta1 * tl.load(exp_avg + at, mask=in_row, other=0.0) + new1 * grad
            square = beta2 * tl.load(exp_avg_sq + at, mask=in_row, other=0.0) + new2 * grad * grad
            tl.store(exp_avg + at, mean, mask=in_row)
            tl.store(exp_avg_sq + at, square, mask=in_row)
            values -= lr * over1 * mean / (tl.sqrt(square) * over_root2 + eps)
        else:
            missed_decay = tl.load(factors + u)
            square = missed_decay * tl.load(exp_avg_sq + at, mask=in_row, other=0.0) + new2 * grad * grad
            tl.store(exp_avg_sq + at, square, mask=in_row)
            values -= lr * grad / (tl.sqrt(square) * over_root2 + eps)
        tl.store(table + at, _stored(values, row, d, table, seed, V), mask=in_row)


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Returns kernels with argument types and constants, for compilation ahead of time without a GPU."""
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for kind, element, dim in (("lazy_adam", "fp32", 1024), ("lazy_adam", "bf16", 1024), ("row_adagrad", "bf16", 100),
                               ("catch_up_adam", "fp32", 100), ("sgd", "bf16", 257)):  # fmt: skip
        reads = {"order": "*i64", "coefficients": "*fp32", "sources": "*i32", "source_rows": f"*{element}"}
        reads |= {"starts": "*i64", "further": "*i64", "ends": "*i64", "partial": "*fp32"}
        arrays = {"rows": "*i32", "table": f"*{element}", "exp_avg": "*fp32", "exp_avg_sq": "*fp32"}
        arrays |= {"factors": "*fp32", "scale": "*fp32"}
        names = ("lr", "decay", "beta1", "new1", "beta2", "new2", "eps", "over1", "over_root2")
        numbers = dict.fromkeys(names, "fp32") | {"seed": "i32"}
        sizes = block_sizes(dim)
        cases.append((_update_rows, reads | arrays | numbers, sizes | {"KIND": _KINDS[kind]}))
        blocks = triton.cdiv(dim, sizes["BLOCK_V"])
        cases.append((_squares, reads | {"squares": "*fp32"}, sizes | {"BLOCKS": blocks}))
    return cases
