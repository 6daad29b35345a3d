"""gathered_rows as custom operators that torch can trace: one forward and one backward for all kernels.

A backend is a module in this folder with `gather` and `table_gradient` (which comes from
`pkm_lightning.ops.row_gradients`).

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: L = T * K reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.segments import check_indices, read_segments


def gather(table_NV: Tensor, ids_TK: Tensor, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.gathered_rows` by the kernels of `backend`."""
    rows: Tensor = _gather(table_NV, ids_TK, backend)
    return rows


def copy_rows(table_NV: Tensor, ids_TK: Tensor, backend: str) -> Tensor:
    """Returns the rows (T, K, V) without an autograd node; for operators that gather as a part of what they do."""
    check_indices("gathered_rows", "ids", ids_TK, len(table_NV))
    if ids_TK.numel() == 0:
        return table_NV.new_empty(*ids_TK.shape, table_NV.shape[1])
    rows_LV: Tensor = load_kernels("gathered_rows", backend).gather(table_NV.contiguous(), ids_TK.flatten())
    return rows_LV.view(*ids_TK.shape, table_NV.shape[1])


@operator("pkm_lightning::gathered_rows")
def _gather(table: Tensor, ids: Tensor, backend: str) -> Tensor:
    return copy_rows(table, ids, backend)


@operator("pkm_lightning::gathered_rows_backward")
def _gather_backward(ids: Tensor, grad: Tensor, n_rows: int, backend: str) -> Tensor:
    """Returns the gradient of the table (N, V): each row adds up the gradients of its reads, in their order."""
    ids_L, grad_LV = ids.flatten(), grad.flatten(0, 1).contiguous()
    # Each read is a source row of its own.
    sources_L = torch.arange(len(ids_L), dtype=torch.int32, device=ids.device)
    one_L = torch.ones(len(ids_L), dtype=grad.dtype, device=ids.device)
    kernels = load_kernels("gathered_rows", backend)
    table_grad_NV: Tensor = kernels.table_gradient(read_segments(ids_L, n_rows), one_L, sources_L, grad_LV, n_rows)
    return table_grad_NV


@_gather.register_fake
def _(table: Tensor, ids: Tensor, backend: str) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


@_gather_backward.register_fake
def _(ids: Tensor, grad: Tensor, n_rows: int, backend: str) -> Tensor:
    return grad.new_empty(n_rows, grad.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, ids, ctx.backend = inputs
    ctx.n_rows = len(table)
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad_TKV: Tensor) -> tuple[Tensor, None, None]:
    (ids_TK,) = ctx.saved_tensors
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels.
    return _gather_backward(ids_TK, grad_TKV, ctx.n_rows, ctx.backend), None, None


_gather.register_autograd(_backward, setup_context=_setup_context)
