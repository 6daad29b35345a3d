"""rms_norm and rms_norm_dot in numba: one pass over the vectors forward, and one for all gradients.

The kernels take fp32; other dtypes are converted before and after, on the whole tensor.

Letters: G equal parts of a vector, C = D / G values of a part, X chunks of vectors.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from numba import float32, njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads

# A constant, so that the order of sums does not depend on the number of threads.
_CHUNKS = 32
# Sums over a part may be regrouped, or they could not be vectorised: the compiler fixes their order.
_KERNEL: dict[str, Any] = {**KERNEL, "fastmath": {"reassoc", "contract"}}


def norm(x_TGC: Tensor, gain_GC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised parts in the dtype of x, and the inverse roots (T, G) in fp32; all tensors contiguous."""
    use_torch_threads()
    wide_TGC = x_TGC.float()
    y_TGC, roots_TG = torch.empty_like(wide_TGC), torch.empty(x_TGC.shape[:2], dtype=torch.float32)
    _norm(*map(numpy_view, (wide_TGC, gain_GC.float(), y_TGC, roots_TG)), eps, ALL)
    return y_TGC.to(x_TGC.dtype), roots_TG


def norm_gradients(grad_TGC: Tensor, x_TGC: Tensor, gain_GC: Tensor, roots_TG: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and gain, each in its dtype; all tensors contiguous."""
    use_torch_threads()
    inputs = grad_TGC.float(), x_TGC.float(), gain_GC.float()
    x_grad_TGC, parts_XGC = torch.empty_like(inputs[1]), inputs[2].new_zeros(_CHUNKS, *gain_GC.shape)
    _norm_gradients(*map(numpy_view, (*inputs, roots_TG, x_grad_TGC, parts_XGC)), ALL)
    return x_grad_TGC.to(x_TGC.dtype), parts_XGC.sum(0).to(gain_GC.dtype)


def dot(x_TGC: Tensor, y_TGC: Tensor, gain_GC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the inner products (T, G) and the inverse roots of x and y (2, T, G) in fp32; all tensors contiguous."""
    use_torch_threads()
    inputs = x_TGC.float(), y_TGC.float(), gain_GC.float()
    dots_TG, roots_2TG = inputs[0].new_empty(x_TGC.shape[:2]), inputs[0].new_empty(2, *x_TGC.shape[:2])
    _dot(*map(numpy_view, (*inputs, dots_TG, roots_2TG)), eps, ALL)
    return dots_TG, roots_2TG


def dot_gradients(
    grad_TG: Tensor, x_TGC: Tensor, y_TGC: Tensor, gain_GC: Tensor, dots_TG: Tensor, roots_2TG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, y and gain, each in its dtype; all tensors contiguous."""
    use_torch_threads()
    inputs = x_TGC.float(), y_TGC.float(), gain_GC.float()
    grads = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), inputs[2].new_zeros(_CHUNKS, *gain_GC.shape)
    _dot_gradients(*map(numpy_view, (grad_TG, *inputs, dots_TG, roots_2TG, *grads)), ALL)
    return grads[0].to(x_TGC.dtype), grads[1].to(y_TGC.dtype), grads[2].sum(0).to(gain_GC.dtype)


@njit(**_KERNEL)
def _norm(x_TGC, gain_GC, y_TGC, roots_TG, eps, worker):  # type: ignore[no-untyped-def]
    tokens, groups, values = x_TGC.shape
    first, last = share(tokens, worker)
    for t in range(first, last):
        for g in range(groups):
            squares = float32(0)
            for c in range(values):
                squares += x_TGC[t, g, c] * x_TGC[t, g, c]
            root = float32(1 / sqrt(squares / values + eps))
            roots_TG[t, g] = root
            for c in range(values):
                y_TGC[t, g, c] = x_TGC[t, g, c] * root * gain_GC[g, c]


@njit(**_KERNEL)
def _norm_gradients(grad_TGC, x_TGC, gain_GC, roots_TG, x_grad_TGC, parts_XGC, worker):  # type: ignore[no-untyped-def]
    """Computes r (w g - x r^2 mean(x w g)) for a part x with the inverse root r, gains w and upstream gradient g."""
    (tokens, groups, values), chunks = x_TGC.shape, parts_XGC.shape[0]
    first, last = share(chunks, worker)
    for chunk in range(first, last):
        for t in range(chunk * tokens // chunks, (chunk + 1) * tokens // chunks):
            for g in range(groups):
                root, along = roots_TG[t, g], float32(0)
                for c in range(values):
                    along += grad_TGC[t, g, c] * gain_GC[g, c] * x_TGC[t, g, c]
                along *= root * root / float32(values)
                for c in range(values):
                    x_grad_TGC[t, g, c] = root * (grad_TGC[t, g, c] * gain_GC[g, c] - along * x_TGC[t, g, c])
                for c in range(values):
                    parts_XGC[chunk, g, c] += grad_TGC[t, g, c] * root * x_TGC[t, g, c]


@njit(**_KERNEL)
def _dot(x_TGC, y_TGC, gain_GC, dots_TG, roots_2TG, eps, worker):  # type: ignore[no-untyped-def]
    tokens, groups, values = x_TGC.shape
    first, last = share(tokens, worker)
    for t in range(first, last):
        for g in range(groups):
            dot, x_squares, y_squares = float32(0), float32(0), float32(0)
            for c in range(values):
                dot += x_TGC[t, g, c] * y_TGC[t, g, c] * gain_GC[g, c]
                x_squares += x_TGC[t, g, c] * x_TGC[t, g, c]
                y_squares += y_TGC[t, g, c] * y_TGC[t, g, c]
            x_root, y_root = float32(1 / sqrt(x_squares / values + eps)), float32(1 / sqrt(y_squares / values + eps))
            dots_TG[t, g], roots_2TG[0, t, g], roots_2TG[1, t, g] = dot * x_root * y_root, x_root, y_root


@njit(**_KERNEL)
def _dot_gradients(grad_TG, x_TGC, y_TGC, gain_GC, dots_TG, roots_2TG, x_grad_TGC, y_grad_TGC, parts_XGC, worker):  # type: ignore[no-untyped-def]
    """Computes g (r q w y - x r^2 s / C) for x, with the dot s, inverse roots r of x and q of y, gains w; y alike."""
    (tokens, groups, values), chunks = x_TGC.shape, parts_XGC.shape[0]
    first, last = share(chunks, worker)
    for chunk in range(first, last):
        for t in range(chunk * tokens // chunks, (chunk + 1) * tokens // chunks):
            for g in range(groups):
                x_root, y_root, grad = roots_2TG[0, t, g], roots_2TG[1, t, g], grad_TG[t, g]
                across, along = grad * x_root * y_root, grad * dots_TG[t, g] / float32(values)
                x_along, y_along = along * x_root * x_root, along * y_root * y_root
                for c in range(values):
                    x_grad_TGC[t, g, c] = across * gain_GC[g, c] * y_TGC[t, g, c] - x_along * x_TGC[t, g, c]
                for c in range(values):
                    y_grad_TGC[t, g, c] = across * gain_GC[g, c] * x_TGC[t, g, c] - y_along * y_TGC[t, g, c]
                for c in range(values):
                    parts_XGC[chunk, g, c] += across * x_TGC[t, g, c] * y_TGC[t, g, c]
