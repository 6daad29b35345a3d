"""weighted_gather as custom operators that torch can trace: one forward and one backward for all kernels.

A backend is a module in this folder with `gather_sum`, `gather_dot` and `table_gradient` (which comes from
`pkm_lightning.ops.row_gradients`). None of them holds a tensor of T * K * V values.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: G groups per token (1 without groups), X = T * G rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.segments import check_indices, read_segments, read_sources


def gather(
    table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int, *, backend: str
) -> Tensor:
    """Computes `pkm_lightning.ops.weighted_gather` as (T, G, V) by the kernels of `backend`.

    The weights must have the table's dtype.
    """
    result: Tensor = _gather(table_NV, ids_TK, weights_TK, groups_TK, n_groups, backend)
    return result


def table_gradient(
    ids_TK: Tensor,
    coefficients_TK: Tensor,
    groups_TK: Tensor | None,
    n_groups: int,
    source_rows_XV: Tensor,
    n_rows: int,
    backend: str,
) -> Tensor:
    """Computes the dense gradient (N, V) of a table: each read adds `coefficient * source row` to its row."""
    segments = read_segments(ids_TK.flatten(), n_rows)
    sources_L = read_sources(ids_TK, groups_TK, n_groups).flatten()
    kernels = load_kernels("weighted_gather", backend)
    gradient_NV: Tensor = kernels.table_gradient(segments, coefficients_TK.flatten(), sources_L, source_rows_XV, n_rows)
    return gradient_NV


def sum_rows(
    table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int, backend: str
) -> Tensor:
    """Returns the sums (T, G, V) without an autograd node; for operators that read as a part of what they do."""
    check_indices("weighted_gather", "ids", ids_TK, len(table_NV))
    if groups_TK is not None:
        check_indices("weighted_gather", "groups", groups_TK, n_groups)
        groups_TK = groups_TK.contiguous()
    # ATen's embedding bag refuses K = 0 ("step must be nonzero", torch 2.13).
    if ids_TK.numel() == 0:
        return table_NV.new_zeros(len(ids_TK), n_groups, table_NV.shape[1])
    kernels = load_kernels("weighted_gather", backend)
    inputs = table_NV.contiguous(), ids_TK.contiguous(), weights_TK.contiguous(), groups_TK
    y_XV: Tensor = kernels.gather_sum(*inputs, n_groups)
    return y_XV.view(len(ids_TK), n_groups, table_NV.shape[1])


@operator("pkm_lightning::weighted_gather")
def _gather(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int, backend: str) -> Tensor:
    return sum_rows(table, ids, weights, groups, n_groups, backend)


@operator("pkm_lightning::weighted_gather_backward")
def gather_backward(
    table: Tensor,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    backend: str,
    needs_table: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of table and weights that are needed, the other as an empty tensor."""
    grad_XV, ids_TK = grad.contiguous().flatten(0, 1), ids.contiguous()
    n_groups = grad.shape[1]
    groups_TK = None if groups is None else groups.contiguous()
    table_grad_NV, weights_grad_TK = table.new_empty(0), weights.new_empty(0)
    if needs_table:
        table_grad_NV = table_gradient(ids_TK, weights, groups_TK, n_groups, grad_XV, len(table), backend)
    if needs_weights and ids_TK.numel() == 0:
        weights_grad_TK = torch.zeros_like(ids_TK, dtype=weights.dtype)
    elif needs_weights:
        kernels = load_kernels("weighted_gather", backend)
        weights_grad_TK = kernels.gather_dot(table.contiguous(), grad_XV, ids_TK, groups_TK, n_groups)
    return table_grad_NV, weights_grad_TK


@_gather.register_fake
def _(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int, backend: str) -> Tensor:
    return table.new_empty(ids.shape[0], n_groups, table.shape[1])


@gather_backward.register_fake
def _(
    table: Tensor,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    backend: str,
    needs_table: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    table_grad_NV = table.new_empty(table.shape if needs_table else (0,))
    return table_grad_NV, weights.new_empty(ids.shape if needs_weights else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, ids, weights, groups, _, ctx.backend = inputs
    ctx.save_for_backward(table, ids, weights, groups)


def _backward(ctx: Any, grad_TGV: Tensor) -> tuple[Tensor | None, ...]:
    needs_table, _, needs_weights, *_ = ctx.needs_input_grad
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels; the FLOP counter sees it too.
    table_grad_NV, weights_grad_TK = gather_backward(
        *ctx.saved_tensors, grad_TGV, ctx.backend, needs_table, needs_weights
    )
    table_grad, weights_grad = table_grad_NV if needs_table else None, weights_grad_TK if needs_weights else None
    return table_grad, None, weights_grad, None, None, None


_gather.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.weighted_gather)
def _flops(table: list[int], ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula(torch.ops.pkm_lightning.weighted_gather_backward)
def _backward_flops(
    table: list[int], ids: list[int], weights: object, groups: object, grad: object, backend: str,
    needs_table: bool, needs_weights: bool, **_: object,
) -> int:  # fmt: skip
    return 2 * ids[0] * ids[1] * table[1] * (needs_table + needs_weights)
