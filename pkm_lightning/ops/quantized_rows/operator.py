"""Reads of quantised rows as custom operators that torch can trace. They have no gradient: such rows are read only.

A backend is a module in this folder with `gather_sum` and `gather_dot`.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: G groups per token (1 without groups).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.quantized_rows.format import QuantizedRows
from pkm_lightning.ops.segments import check_indices


def gather(
    rows: QuantizedRows, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int, *, backend: str
) -> Tensor:
    """Computes `pkm_lightning.ops.quantized_gather` as (T, G, V) by the kernels of `backend`, in float32."""
    result: Tensor = _gather(*rows, ids_TK, weights_TK, groups_TK, n_groups, backend)
    return result


def dot(rows: QuantizedRows, x_TV: Tensor, ids_TK: Tensor, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.quantized_dot` by the kernels of `backend`, in float32."""
    result: Tensor = _dot(*rows, x_TV, ids_TK, backend)
    return result


@operator("pkm_lightning::quantized_gather")
def _gather(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    dim: int,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    n_groups: int,
    backend: str,
) -> Tensor:
    check_indices("quantized_gather", "ids", ids, len(codes))
    if groups is not None:
        check_indices("quantized_gather", "groups", groups, n_groups)
        groups = groups.contiguous()
    if ids.numel() == 0:
        return weights.new_zeros(len(ids), n_groups, dim)
    rows = QuantizedRows(codes.contiguous(), scales.contiguous(), bits, dim)
    kernels = load_kernels("quantized_rows", backend)
    y_XV: Tensor = kernels.gather_sum(rows, ids.contiguous(), weights.contiguous(), groups, n_groups)
    return y_XV.view(len(ids), n_groups, dim)


@operator("pkm_lightning::quantized_dot")
def _dot(codes: Tensor, scales: Tensor, bits: int, dim: int, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    check_indices("quantized_dot", "ids", ids, len(codes))
    if ids.numel() == 0:
        return x.new_zeros(ids.shape)
    rows = QuantizedRows(codes.contiguous(), scales.contiguous(), bits, dim)
    a_TK: Tensor = load_kernels("quantized_rows", backend).gather_dot(rows, x.contiguous(), ids.contiguous())
    return a_TK


@_gather.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    dim: int,
    ids: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    n_groups: int,
    backend: str,
) -> Tensor:
    return weights.new_empty(ids.shape[0], n_groups, dim)


@_dot.register_fake
def _(codes: Tensor, scales: Tensor, bits: int, dim: int, x: Tensor, ids: Tensor, backend: str) -> Tensor:
    return x.new_empty(ids.shape)


def _refuse_gradient(ctx: Any, *_: Tensor) -> NoReturn:
    raise RuntimeError(
        "quantised rows are read only and pass no gradient on; train with the table as it was before it was quantised, "
        "or read it under torch.no_grad()."
    )


_gather.register_autograd(_refuse_gradient)
_dot.register_autograd(_refuse_gradient)


@register_flop_formula(torch.ops.pkm_lightning.quantized_gather)
def _gather_flops(codes: object, scales: object, bits: int, dim: int, ids: list[int], *_: object, **__: object) -> int:
    return 2 * ids[0] * ids[1] * dim


@register_flop_formula(torch.ops.pkm_lightning.quantized_dot)
def _dot_flops(
    codes: object, scales: object, bits: int, dim: int, x: object, ids: list[int], *_: object, **__: object
) -> int:
    return 2 * ids[0] * ids[1] * dim
