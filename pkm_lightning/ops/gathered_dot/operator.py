"""gathered_dot as custom operators that torch can trace, on the kernels of weighted_gather.

With `y[t] = sum_k w[t, k] * table[ids[t, k]]`, the gradient of y in w for the upstream x is exactly
`<table[ids[t, k]], x[t]>`. Each of the two ops is therefore the other's backward, and the table's gradient is the same
sum in both.

The arguments of a custom operator form its schema, so they carry no shape suffix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.segments import check_indices
from pkm_lightning.ops.weighted_gather.operator import table_gradient


def dot(table_NV: Tensor, x_TV: Tensor, ids_TK: Tensor, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.gathered_dot` by the kernels of `backend`; x has the table's dtype."""
    result: Tensor = _dot(table_NV, x_TV, ids_TK, backend)
    return result


@operator("pkm_lightning::gathered_dot")
def _dot(table: Tensor, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    check_indices("gathered_dot", "ids", ids, len(table))
    if ids.numel() == 0:
        return x.new_zeros(ids.shape)
    kernels = load_kernels("weighted_gather", backend)
    a_TK: Tensor = kernels.gather_dot(table.contiguous(), x.contiguous(), ids.contiguous(), None, 1)
    return a_TK


@operator("pkm_lightning::gathered_dot_backward")
def _dot_backward(
    table: Tensor, x: Tensor, ids: Tensor, grad: Tensor, backend: str, needs_table: bool, needs_x: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients that are needed, each of the others as an empty tensor."""
    ids_TK, grad_TK = ids.contiguous(), grad.contiguous()
    table_grad_NV, x_grad_TV = table.new_empty(0), x.new_empty(0)
    if needs_table:
        table_grad_NV = table_gradient(ids_TK, grad_TK, None, 1, x.contiguous(), len(table), backend)
    if needs_x and ids_TK.numel() == 0:
        x_grad_TV = x.new_zeros(x.shape)
    elif needs_x:
        kernels = load_kernels("weighted_gather", backend)
        x_grad_TV = kernels.gather_sum(table.contiguous(), ids_TK, grad_TK, None, 1)
    return table_grad_NV, x_grad_TV


@_dot.register_fake
def _(table: Tensor, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    return x.new_empty(ids.shape)


@_dot_backward.register_fake
def _(
    table: Tensor, x: Tensor, ids: Tensor, grad: Tensor, backend: str, needs_table: bool, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return table.new_empty(table.shape if needs_table else (0,)), x.new_empty(x.shape if needs_x else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    needs_table, needs_x, *_ = ctx.needs_input_grad
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels; the FLOP counter sees it too.
    table_grad_NV, x_grad_TV = _dot_backward(*ctx.saved_tensors, grad_TK, ctx.backend, needs_table, needs_x)
    return table_grad_NV if needs_table else None, x_grad_TV if needs_x else None, None, None


_dot.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.gathered_dot)
def _flops(table: list[int], x: object, ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * table[1]


@register_flop_formula(torch.ops.pkm_lightning.gathered_dot_backward)
def _backward_flops(
    table: list[int], x: object, ids: list[int], grad: object, backend: str, needs_table: bool, needs_x: bool,
    **_: object,
) -> int:  # fmt: skip
    return 2 * ids[0] * ids[1] * table[1] * (needs_table + needs_x)
