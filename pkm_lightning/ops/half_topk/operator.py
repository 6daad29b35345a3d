"""half_topk as custom operators that torch can trace, with a gradient that touches only the keys that were chosen.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator


def half_topk_kernels(
    q_XTF: Tensor, keys_XSF: Tensor, k: int, *, backend: str, precision: str
) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.half_topk` by the kernels of `backend`, `cpu` or `triton`."""
    values_XTK, indices_XTK = _half_topk(q_XTF, keys_XSF, k, backend, precision)
    return values_XTK, indices_XTK


@operator("pkm_lightning::half_topk")
def _half_topk(q: Tensor, keys: Tensor, k: int, backend: str, precision: str) -> tuple[Tensor, Tensor]:
    values_XTK = q.new_empty(*q.shape[:2], k)
    indices_XTK = values_XTK.new_empty(values_XTK.shape, dtype=torch.int32)
    load_kernels("half_topk", backend).best_keys(q.contiguous(), keys.contiguous(), values_XTK, indices_XTK, precision)
    return values_XTK, indices_XTK


@operator("pkm_lightning::half_topk_backward")
def _half_topk_backward(grad: Tensor, indices: Tensor, q: Tensor, keys: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    # Zeros: the CPU kernel adds to them, and the GPU kernel does not write keys that no query chose.
    q_grad_XTF, keys_grad_XSF = q.new_zeros(q.shape), keys.new_zeros(keys.shape)
    if grad.numel():
        inputs = (grad.contiguous(), indices, q.contiguous(), keys.contiguous())
        load_kernels("half_topk", backend).add_gradients(*inputs, q_grad_XTF, keys_grad_XSF)
    return q_grad_XTF, keys_grad_XSF


@_half_topk.register_fake
def _(q: Tensor, keys: Tensor, k: int, backend: str, precision: str) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], k)
    return q.new_empty(shape), q.new_empty(shape, dtype=torch.int32)


@_half_topk_backward.register_fake
def _(grad: Tensor, indices: Tensor, q: Tensor, keys: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), keys.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, str, str], output: tuple[Tensor, Tensor]) -> None:
    q_XTF, keys_XSF, _, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], q_XTF, keys_XSF)


def _backward(ctx: Any, grad_XTK: Tensor, _indices: Any) -> tuple[Tensor, Tensor, None, None, None]:
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels; the FLOP counter sees it too.
    q_grad_XTF, keys_grad_XSF = _half_topk_backward(grad_XTK, *ctx.saved_tensors, ctx.backend)
    return q_grad_XTF, keys_grad_XSF, None, None, None


_half_topk.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.half_topk)
def _flops(q_shape: tuple[int, int, int], keys_shape: tuple[int, int, int], *_: Any, **__: Any) -> int:
    entries, tokens, dim = q_shape
    return 2 * entries * tokens * dim * keys_shape[1]


@register_flop_formula(torch.ops.pkm_lightning.half_topk_backward)
def _backward_flops(
    grad_shape: tuple[int, int, int], _indices: Any, q_shape: tuple[int, int, int], *_: Any, **__: Any
) -> int:
    entries, tokens, k = grad_shape
    return 4 * entries * tokens * k * q_shape[2]
