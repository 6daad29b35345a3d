"""causal_convolution as custom operators that torch can trace: one pass forward and one backward for all kernels.

A backend is a module in this folder with `convolve` and `gradients`, which sum in float32 and round once.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: L taps of the filter, P = T tokens and those in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.causal_convolution.eager import convolve
from pkm_lightning.ops.operators import operator


def convolve_in_one_pass(
    x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, length: int, dilation: int, *, backend: str
) -> Tensor:
    """Computes `pkm_lightning.ops.causal_convolution` by the kernels of `backend`; fp64 goes to `eager`."""
    if x_BPD.dtype is torch.float64:
        return convolve(x_BPD, weight_DL, doc_ids_BP, length, dilation)
    y_BTD: Tensor = _convolve(x_BPD, weight_DL, doc_ids_BP, length, dilation, backend)
    return y_BTD


@operator("pkm_lightning::causal_convolution")
def _convolve(x: Tensor, weight: Tensor, doc_ids: Tensor | None, length: int, dilation: int, backend: str) -> Tensor:
    docs_BP = None if doc_ids is None else doc_ids.contiguous()
    kernels = load_kernels("causal_convolution", backend)
    y_BTD: Tensor = kernels.convolve(x.contiguous(), weight, docs_BP, length, dilation)
    return y_BTD


@operator("pkm_lightning::causal_convolution_backward")
def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, doc_ids: Tensor | None, dilation: int, backend: str
) -> tuple[Tensor, Tensor]:
    docs_BP = None if doc_ids is None else doc_ids.contiguous()
    kernels = load_kernels("causal_convolution", backend)
    x_grad_BPD, weight_grad_DL = kernels.gradients(grad.contiguous(), x.contiguous(), weight, docs_BP, dilation)
    return x_grad_BPD, weight_grad_DL


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, doc_ids: Tensor | None, length: int, dilation: int, backend: str) -> Tensor:
    return x.new_empty(len(x), length, x.shape[2])


@_convolve_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, doc_ids: Tensor | None, dilation: int, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BPD, weight_DL, doc_ids_BP, _, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(x_BPD, weight_DL, doc_ids_BP)


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels; the FLOP counter sees it too.
    x_grad_BPD, weight_grad_DL = _convolve_backward(grad_BTD, *ctx.saved_tensors, ctx.dilation, ctx.backend)
    return x_grad_BPD, weight_grad_DL, None, None, None, None


_convolve.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.causal_convolution)
def _flops(x_shape: Any, weight_shape: Any, _doc_ids: Any, length: int, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * length * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.pkm_lightning.causal_convolution_backward)
def _backward_flops(grad_shape: Any, _x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 4 * grad_shape[0] * grad_shape[1] * weight_shape[0] * weight_shape[1]
