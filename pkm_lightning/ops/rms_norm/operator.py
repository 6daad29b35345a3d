"""rms_norm and rms_norm_dot as custom operators that torch can trace: one pass forward and one backward each.

A backend is a module in this folder with `norm`, `dot` and their gradients. Its kernels take vectors and gains of any
floating dtype, compute in fp32 and return each gradient in the dtype of its tensor.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: G equal parts of a vector, C = D / G values of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.rms_norm import eager

#: Most values of a part per backend, where there is a limit: a GPU program holds a part in registers, which run out.
LARGEST_PART = {"triton": 8192}


def norm(x_TD: Tensor, gain_D: Tensor, groups: int, eps: float, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm` by the kernels of `backend`; what they do not take goes to `eager`."""
    if not _has_kernel(backend, x_TD, groups):
        return eager.norm(x_TD, gain_D, groups, eps)
    y_TD, _ = _norm(x_TD, gain_D, groups, eps, backend)
    return y_TD


def dot(x_TD: Tensor, y_TD: Tensor, gain_D: Tensor, groups: int, eps: float, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.rms_norm_dot` by the kernels of `backend`; what they do not take goes to `eager`."""
    if not _has_kernel(backend, x_TD, groups):
        return eager.dot(x_TD, y_TD, gain_D, groups, eps)
    dots_TG, _ = _dot(x_TD, y_TD, gain_D, groups, eps, backend)
    return dots_TG


def _has_kernel(backend: str, x_TD: Tensor, groups: int) -> bool:
    """Returns whether the kernels take `x`: they compute in fp32, and some hold a whole part at once."""
    fits = x_TD.shape[-1] // groups <= LARGEST_PART.get(backend, x_TD.shape[-1])
    return fits and x_TD.dtype is not torch.float64


def _parts(groups: int, *vectors: Tensor) -> list[Tensor]:
    """Returns the parts of vectors of any leading shape, each (T, G, C) and contiguous."""
    return [x_TD.contiguous().view(-1, groups, x_TD.shape[-1] // groups) for x_TD in vectors]


@operator("pkm_lightning::rms_norm")
def _norm(x: Tensor, gain: Tensor, groups: int, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Returns the result in the dtype of x, and the inverse roots (T, G) in fp32."""
    x_TGC, gain_1GC = _parts(groups, x, gain)
    y_TGC, roots_TG = _kernels(backend).norm(x_TGC, gain_1GC[0], eps)
    return y_TGC.view(x.shape), roots_TG


@operator("pkm_lightning::rms_norm_backward")
def _norm_backward(
    grad: Tensor, x: Tensor, gain: Tensor, roots: Tensor, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    grad_TGC, x_TGC, gain_1GC = _parts(groups, grad, x, gain)
    x_grad_TGC, gain_grad_GC = _kernels(backend).norm_gradients(grad_TGC, x_TGC, gain_1GC[0], roots)
    return x_grad_TGC.view(x.shape), gain_grad_GC.view(gain.shape)


@operator("pkm_lightning::rms_norm_dot")
def _dot(x: Tensor, y: Tensor, gain: Tensor, groups: int, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Returns the result, and the inverse roots of x and y (2, T, G); both in fp32."""
    x_TGC, y_TGC, gain_1GC = _parts(groups, x, y, gain)
    dots_TG, roots_2TG = _kernels(backend).dot(x_TGC, y_TGC, gain_1GC[0], eps)
    return dots_TG.view(*x.shape[:-1], groups), roots_2TG


@operator("pkm_lightning::rms_norm_dot_backward")
def _dot_backward(
    grad: Tensor, x: Tensor, y: Tensor, gain: Tensor, dots: Tensor, roots: Tensor, groups: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    x_TGC, y_TGC, gain_1GC = _parts(groups, x, y, gain)
    grad_TG, dots_TG = grad.contiguous().view(-1, groups), dots.view(-1, groups)
    x_grad_TGC, y_grad_TGC, gain_grad_GC = _kernels(backend).dot_gradients(
        grad_TG, x_TGC, y_TGC, gain_1GC[0], dots_TG, roots
    )
    return x_grad_TGC.view(x.shape), y_grad_TGC.view(y.shape), gain_grad_GC.view(gain.shape)


def _kernels(backend: str) -> Any:
    return load_kernels("rms_norm", backend)


@_norm.register_fake
def _(x: Tensor, gain: Tensor, groups: int, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), groups, dtype=torch.float32)


@_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, gain: Tensor, roots: Tensor, groups: int, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


@_dot.register_fake
def _(x: Tensor, y: Tensor, gain: Tensor, groups: int, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dots = x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)
    return dots, x.new_empty(2, x.shape[:-1].numel(), groups, dtype=torch.float32)


@_dot_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor, gain: Tensor, dots: Tensor, roots: Tensor, groups: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


def _save_norm(ctx: Any, inputs: tuple[Tensor, Tensor, int, float, str], output: tuple[Tensor, Tensor]) -> None:
    x, gain, ctx.groups, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gain, output[1])


def _through_norm(ctx: Any, grad_TD: Tensor, _roots: Any) -> tuple[Tensor, Tensor, None, None, None]:
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels.
    x_grad_TD, gain_grad_D = _norm_backward(grad_TD, *ctx.saved_tensors, ctx.groups, ctx.backend)
    return x_grad_TD, gain_grad_D, None, None, None


def _save_dot(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, float, str], output: tuple[Tensor, Tensor]) -> None:
    *vectors_and_gain, ctx.groups, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*vectors_and_gain, *output)


def _through_dot(ctx: Any, grad_TG: Tensor, _roots: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    # As in `_through_norm`.
    x_grad_TD, y_grad_TD, gain_grad_D = _dot_backward(grad_TG, *ctx.saved_tensors, ctx.groups, ctx.backend)
    return x_grad_TD, y_grad_TD, gain_grad_D, None, None, None


_norm.register_autograd(_through_norm, setup_context=_save_norm)
_dot.register_autograd(_through_dot, setup_context=_save_dot)
