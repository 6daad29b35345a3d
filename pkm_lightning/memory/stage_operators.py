"""The reads of a table that learns by rows as custom operators: forward reads, backward stages the table's gradient.

torch can trace them, so that compiled blocks can read tables. Arguments of an operator are numbers and tensors, so the
stage of a table is passed as an integer handle and looked up here.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: T tokens, or reads where a plugin reads several times per token, K lines per read, L = T * K, G groups per
read, X = T * G source rows.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.gathered_rows.operator import copy_rows
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.row_update import RowGradient, row_gradient_dots
from pkm_lightning.ops.segments import read_sources
from pkm_lightning.ops.weighted_gather.operator import gather_backward, sum_rows


class Stage(Protocol):
    """What operators do with a `RowStage`, which itself imports this module."""

    def record_read(self, device: torch.device) -> None:
        """Records a read with gradients enabled."""

    def add(
        self,
        ids_L: Tensor,
        coefficients_L: Tensor | None,
        sources_L: Tensor | None,
        source_rows_XV: Tensor,
    ) -> None:
        """Appends a read; without coefficients and sources each read has a source row of its own."""

    def sole_gradient(self, ids_L: Tensor, table_NV: Tensor) -> RowGradient | None:
        """Returns the gradient of the reads `ids`, if nothing else is staged."""


# Dtypes for which a kernel computes the gradients of the weights row by row, from the sorted reads of the update.
_SORTED_DTYPES = (torch.float32, torch.bfloat16)
# The table owns its stage: this dictionary must not keep it alive.
_stages: weakref.WeakValueDictionary[int, Stage] = weakref.WeakValueDictionary()
_handles = itertools.count()


def register_stage(stage: Stage) -> Tensor:
    """Returns the handle by which operators find `stage`, a scalar tensor on the CPU."""
    handle = next(_handles)
    _stages[handle] = stage
    # A tensor, because torch.compile specialises on numbers and would compile a block once per table.
    return torch.tensor(handle, dtype=torch.int64, device="cpu")


def _stage(handle: Tensor) -> Stage:
    stage = _stages.get(int(handle))
    if stage is None:
        raise RuntimeError("the table of this read no longer exists: keep the model until its backward pass has ended.")
    return stage


@operator("pkm_lightning::stage_sum")
def stage_sum(
    table: Tensor,
    ids: Tensor,
    staged: Tensor | None,
    weights: Tensor,
    groups: Tensor | None,
    n_groups: int,
    anchor: Tensor,
    handle: Tensor,
    backend: str,
) -> Tensor:
    """Returns the weighted sums of the rows `ids`, (T, G, V); backward stages their gradient under the ids `staged`.

    `staged` is None where these are the same ids.
    """
    _stage(handle).record_read(table.device)
    return sum_rows(table, ids, weights, groups, n_groups, backend)


@operator("pkm_lightning::stage_sum_backward")
def _stage_sum_backward(
    table: Tensor,
    ids: Tensor,
    staged: Tensor | None,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    handle: Tensor,
    backend: str,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Stages the read; returns the gradient of the weights, where it is needed, and the zero of the anchor."""
    stage, grad_XV = _stage(handle), grad.contiguous().flatten(0, 1)
    stage.add(
        (ids if staged is None else staged).flatten(),
        weights.flatten(),
        read_sources(ids, groups, grad.shape[1]).flatten(),
        grad_XV,
    )
    weights_grad = weights.new_zeros(ids.shape if needs_weights else (0,))
    if ids.numel() and needs_weights:
        gradient = None
        if staged is None and backend == "cpu" and table.dtype in _SORTED_DTYPES:
            gradient = stage.sole_gradient(ids.flatten(), table)
        if gradient is not None:
            dots_L = row_gradient_dots(table.contiguous(), gradient, backend=backend)
            weights_grad = dots_L.to(weights.dtype).view(ids.shape)
        else:
            kernels = load_kernels("weighted_gather", backend)
            weights_grad = kernels.gather_dot(table.contiguous(), grad_XV, ids.contiguous(), groups, grad.shape[1])
    return weights_grad, torch.zeros((), dtype=torch.float32, device="cpu")


@operator("pkm_lightning::stage_dot")
def stage_dot(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, handle: Tensor) -> Tensor:
    """Returns `dots`, the inner products <row ids[t, k], x[t]>; backward stages their gradient."""
    _stage(handle).record_read(dots.device)
    # An operator's output must not alias its input.
    return dots.clone()


@operator("pkm_lightning::stage_rows")
def stage_rows(table: Tensor, ids: Tensor, staged: Tensor, anchor: Tensor, handle: Tensor, backend: str) -> Tensor:
    """Returns the rows `ids`, (T, K, V); backward stages their gradient under the ids `staged`."""
    _stage(handle).record_read(table.device)
    return copy_rows(table, ids, backend)


@operator("pkm_lightning::stage_reads")
def _stage_reads(ids: Tensor, coefficients: Tensor | None, rows: Tensor, handle: Tensor) -> Tensor:
    """Stages a read whose source rows are one per token, or where there are no coefficients one per read."""
    if coefficients is None:
        _stage(handle).add(ids.flatten(), None, None, rows)
    else:
        _stage(handle).add(ids.flatten(), coefficients.flatten(), read_sources(ids).flatten(), rows)
    return torch.zeros((), dtype=torch.float32, device="cpu")


@stage_sum.register_fake
def _(
    table: Tensor,
    ids: Tensor,
    staged: Tensor | None,
    weights: Tensor,
    groups: Tensor | None,
    n_groups: int,
    anchor: Tensor,
    handle: Tensor,
    backend: str,
) -> Tensor:
    return table.new_empty(ids.shape[0], n_groups, table.shape[1])


@_stage_sum_backward.register_fake
def _(
    table: Tensor,
    ids: Tensor,
    staged: Tensor | None,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    handle: Tensor,
    backend: str,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(ids.shape if needs_weights else (0,)), torch.empty((), dtype=torch.float32, device="cpu")


@stage_dot.register_fake
def _(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(dots)


@stage_rows.register_fake
def _(table: Tensor, ids: Tensor, staged: Tensor, anchor: Tensor, handle: Tensor, backend: str) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


@_stage_reads.register_fake
def _(ids: Tensor, coefficients: Tensor | None, rows: Tensor, handle: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device="cpu")


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, ids_TK, staged_TK, weights_TK, groups_TK, _, _, handle, ctx.backend = inputs
    ctx.save_for_backward(table, ids_TK, staged_TK, weights_TK, groups_TK, handle)


def _backward_sum(ctx: Any, grad_TGV: Tensor) -> tuple[Tensor | None, ...]:
    *read, handle = ctx.saved_tensors
    needs_table, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    weights_grad_TK, zero = _stage_sum_backward(*read, grad_TGV, handle, ctx.backend, needs_weights)
    # The weight of a table that learns by rows requires no gradient, unless somebody asks for it.
    table_grad_NV = None
    if needs_table:
        table, ids_TK, _, weights_TK, groups_TK = read
        table_grad_NV, _ = gather_backward(table, ids_TK, weights_TK, groups_TK, grad_TGV, ctx.backend, True, False)
    return table_grad_NV, None, None, weights_grad_TK if needs_weights else None, None, None, zero, None, None


def _save_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_TK, x_TV, _, handle = inputs
    ctx.save_for_backward(ids_TK, x_TV, handle)


def _backward_dot(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    ids_TK, x_TV, handle = ctx.saved_tensors
    zero = _stage_reads(ids_TK, grad_TK, x_TV, handle)
    return grad_TK, None, None, zero, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, staged_TK, _, handle, _ = inputs
    ctx.save_for_backward(staged_TK, handle)


def _backward_rows(ctx: Any, grad_TKV: Tensor) -> tuple[None, None, None, Tensor, None, None]:
    staged_TK, handle = ctx.saved_tensors
    zero = _stage_reads(staged_TK, None, grad_TKV.flatten(0, 1), handle)
    return None, None, None, zero, None, None


# Two reads of a table by the same ids and weights stage twice: a compiler must not merge them as common subexpressions.
if hasattr(_stage_reads.registered, "register_effect"):  # torch 2.13 has it, older versions do not
    from torch._library.effects import EffectType

    _stage_reads.registered.register_effect(EffectType.ORDERED)
    _stage_sum_backward.registered.register_effect(EffectType.ORDERED)
stage_sum.register_autograd(_backward_sum, setup_context=_save_sum)
stage_dot.register_autograd(_backward_dot, setup_context=_save_dot)
stage_rows.register_autograd(_backward_rows, setup_context=_save_rows)


@register_flop_formula(torch.ops.pkm_lightning.stage_sum)
def _sum_flops(table: list[int], ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula(torch.ops.pkm_lightning.stage_sum_backward)
def _sum_backward_flops(
    table: list[int], ids: list[int], staged: object, weights: object, groups: object, grad: object, handle: object,
    backend: str, needs_weights: bool, **_: object,
) -> int:  # fmt: skip
    return 2 * ids[0] * ids[1] * table[1] * needs_weights
