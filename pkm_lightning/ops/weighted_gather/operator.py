"""The weighted gather as operators that torch can trace: one forward, one backward, whatever kernels they run on.

A backend is a module beside this one with `gather_sum`, `gather_dot` and `table_gradient` (which it takes from
`pkm_lightning.ops.row_gradients`). No tensor of T * K * D values exists anywhere.

Letters: N rows of the table, D values a row, T reads, K rows a read, G groups a read (1 without groups), X = T * G.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.segments import check_indices, read_segments, read_sources


def gather(
    table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int, *, backend: str
) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`: y_TGD; weights have the table's dtype."""
    result: Tensor = _gather(table_ND, ids_TK, weights_TK, groups_TK, n_groups, backend)
    return result


def gather_kernels(backend: str) -> ModuleType:
    """The module of `backend`, imported when it is first used: numba and triton take their time."""
    return importlib.import_module(f"pkm_lightning.ops.weighted_gather.{backend}")


@library.custom_op("pkm_lightning::weighted_gather", mutates_args=())
def _gather(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int, backend: str) -> Tensor:
    check_indices("weighted_gather", "ids", ids, len(table))
    if groups is not None:
        check_indices("weighted_gather", "groups", groups, n_groups)
        groups = groups.contiguous()
    if ids.numel() == 0:
        return table.new_zeros(len(ids), n_groups, table.shape[1])
    kernels = gather_kernels(backend)
    y_XD: Tensor = kernels.gather_sum(table.contiguous(), ids.contiguous(), weights.contiguous(), groups, n_groups)
    return y_XD.view(len(ids), n_groups, table.shape[1])


@library.custom_op("pkm_lightning::weighted_gather_backward", mutates_args=())
def _gather_backward(
    table: Tensor,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    backend: str,
    table_too: bool,
    weights_too: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted; an empty tensor in the place of one that is not."""
    grad_XD, ids_TK = grad.contiguous().flatten(0, 1), ids.contiguous()
    n_groups = grad.shape[1]
    groups_TK = None if groups is None else groups.contiguous()
    kernels = gather_kernels(backend)
    table_grad_ND, weights_grad_TK = table.new_empty(0), weights.new_empty(0)
    if table_too:
        segments = read_segments(ids_TK.flatten(), len(table))
        sources_L = read_sources(ids_TK, groups_TK, n_groups).flatten()
        table_grad_ND = kernels.table_gradient(segments, weights.flatten(), sources_L, grad_XD, len(table))
    if weights_too and ids_TK.numel() == 0:
        weights_grad_TK = torch.zeros_like(ids_TK, dtype=weights.dtype)
    elif weights_too:
        weights_grad_TK = kernels.gather_dot(table.contiguous(), grad_XD, ids_TK, groups_TK, n_groups)
    return table_grad_ND, weights_grad_TK


@_gather.register_fake
def _(table: Tensor, ids: Tensor, weights: Tensor, groups: Tensor | None, n_groups: int, backend: str) -> Tensor:
    return table.new_empty(ids.shape[0], n_groups, table.shape[1])


@_gather_backward.register_fake
def _(
    table: Tensor,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    grad: Tensor,
    backend: str,
    table_too: bool,
    weights_too: bool,
) -> tuple[Tensor, Tensor]:
    table_grad_ND = table.new_empty(table.shape if table_too else (0,))
    return table_grad_ND, weights.new_empty(ids.shape if weights_too else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, ids, weights, groups, _, ctx.backend = inputs
    ctx.save_for_backward(table, ids, weights, groups)


def _backward(ctx: Any, grad_TGD: Tensor) -> tuple[Tensor | None, ...]:
    table_too, _, weights_too, *_ = ctx.needs_input_grad
    table_grad_ND, weights_grad_TK = _gather_backward(*ctx.saved_tensors, grad_TGD, ctx.backend, table_too, weights_too)
    return table_grad_ND if table_too else None, None, weights_grad_TK if weights_too else None, None, None, None


_gather.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.weighted_gather)
def _flops(table: list[int], ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula(torch.ops.pkm_lightning.weighted_gather_backward)
def _backward_flops(
    table: list[int], ids: list[int], weights: object, groups: object, grad: object, backend: str,
    table_too: bool, weights_too: bool, **_: object,
) -> int:  # fmt: skip
    return 2 * ids[0] * ids[1] * table[1] * (table_too + weights_too)
