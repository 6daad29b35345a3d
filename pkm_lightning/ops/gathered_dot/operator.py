"""The gathered inner products as operators that torch can trace, on the kernels of the weighted gather.

With `y[t] = sum_k w[t, k] * table[ids[t, k]]`, the gradient of y in w for the upstream x is exactly
`<table[ids[t, k]], x[t]>`: the two ops are each other's backward, and the table's gradient is one sum for both.

Letters: N rows of the table, D values a row, T tokens, K rows a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.segments import check_indices, read_segments, read_sources
from pkm_lightning.ops.weighted_gather.operator import gather_kernels


def dot(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor, *, backend: str) -> Tensor:
    """See `pkm_lightning.ops.gathered_dot`; x has the table's dtype."""
    result: Tensor = _dot(table_ND, x_TD, ids_TK, backend)
    return result


@library.custom_op("pkm_lightning::gathered_dot", mutates_args=())
def _dot(table: Tensor, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    check_indices("gathered_dot", "ids", ids, len(table))
    if ids.numel() == 0:
        return x.new_zeros(ids.shape)
    a_TK: Tensor = gather_kernels(backend).gather_dot(table.contiguous(), x.contiguous(), ids.contiguous(), None, 1)
    return a_TK


@library.custom_op("pkm_lightning::gathered_dot_backward", mutates_args=())
def _dot_backward(
    table: Tensor, x: Tensor, ids: Tensor, grad: Tensor, backend: str, table_too: bool, x_too: bool
) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted; an empty tensor in the place of one that is not."""
    ids_TK, grad_TK = ids.contiguous(), grad.contiguous()
    kernels = gather_kernels(backend)
    table_grad_ND, x_grad_TD = table.new_empty(0), x.new_empty(0)
    if table_too:
        segments = read_segments(ids_TK.flatten(), len(table))
        sources_L = read_sources(ids_TK).flatten()
        table_grad_ND = kernels.table_gradient(segments, grad_TK.flatten(), sources_L, x.contiguous(), len(table))
    if x_too and ids_TK.numel() == 0:
        x_grad_TD = x.new_zeros(x.shape)
    elif x_too:
        x_grad_TD = kernels.gather_sum(table.contiguous(), ids_TK, grad_TK, None, 1)
    return table_grad_ND, x_grad_TD


@_dot.register_fake
def _(table: Tensor, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    return x.new_empty(ids.shape)


@_dot_backward.register_fake
def _(
    table: Tensor, x: Tensor, ids: Tensor, grad: Tensor, backend: str, table_too: bool, x_too: bool
) -> tuple[Tensor, Tensor]:
    return table.new_empty(table.shape if table_too else (0,)), x.new_empty(x.shape if x_too else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    table_too, x_too, *_ = ctx.needs_input_grad
    table_grad_ND, x_grad_TD = _dot_backward(*ctx.saved_tensors, grad_TK, ctx.backend, table_too, x_too)
    return table_grad_ND if table_too else None, x_grad_TD if x_too else None, None, None


_dot.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.gathered_dot)
def _flops(table: list[int], x: object, ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula(torch.ops.pkm_lightning.gathered_dot_backward)
def _backward_flops(
    table: list[int], x: object, ids: list[int], grad: object, backend: str, table_too: bool, x_too: bool, **_: object
) -> int:
    return 2 * ids[0] * ids[1] * table[1] * (table_too + x_too)
