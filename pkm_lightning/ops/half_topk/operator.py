"""The best keys of every query by kernels, as an operator with a sparse gradient.

Letters: X heads and halves, T tokens, E dimension of a key, S keys, K kept.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula


def half_topk_kernels(q_XTE: Tensor, keys_XSE: Tensor, k: int, *, backend: str) -> tuple[Tensor, Tensor]:
    """See `pkm_lightning.ops.half_topk`; `backend` is `cpu` or `triton`."""
    values_XTK, indices_XTK = _half_topk(q_XTE, keys_XSE, k, backend)
    return values_XTK, indices_XTK


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"pkm_lightning.ops.half_topk.{backend}")


@library.custom_op("pkm_lightning::half_topk", mutates_args=())
def _half_topk(q: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    values_XTK = q.new_empty(*q.shape[:2], k)
    indices_XTK = values_XTK.new_empty(values_XTK.shape, dtype=torch.int32)
    _kernels(backend).best_keys(q.contiguous(), keys.contiguous(), values_XTK, indices_XTK)
    return values_XTK, indices_XTK


@library.custom_op("pkm_lightning::half_topk_backward", mutates_args=())
def _half_topk_backward(grad: Tensor, indices: Tensor, q: Tensor, keys: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    q_grad_XTE, keys_grad_XSE = q.new_zeros(q.shape), keys.new_zeros(keys.shape)
    given = (grad.contiguous(), indices, q.contiguous(), keys.contiguous())
    if grad.numel():
        _kernels(backend).add_gradients(*given, q_grad_XTE, keys_grad_XSE)
    return q_grad_XTE, keys_grad_XSE


@_half_topk.register_fake
def _(q: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], k)
    return q.new_empty(shape), q.new_empty(shape, dtype=torch.int32)


@_half_topk_backward.register_fake
def _(grad: Tensor, indices: Tensor, q: Tensor, keys: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), keys.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: tuple[Tensor, Tensor]) -> None:
    q_XTE, keys_XSE, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], q_XTE, keys_XSE)


def _backward(ctx: Any, grad_XTK: Tensor, _indices: Any) -> tuple[Tensor, Tensor, None, None]:
    q_grad_XTE, keys_grad_XSE = _half_topk_backward(grad_XTK, *ctx.saved_tensors, ctx.backend)
    return q_grad_XTE, keys_grad_XSE, None, None


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
