"""product_search as custom operators that torch can trace: one for the search, and one for both gradients.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: Y sets of sub-keys, X = 2 * H half queries of a token, F dimension of a half key; J sub-keys kept per half; 2
is the two halves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator


def search_kernels(q_TH2F: Tensor, keys_Y2SF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.product_search` by the kernels of the CPU."""
    sums_THK, ids_THK, _, _ = _search(q_TH2F, keys_Y2SF, k)
    return sums_THK, ids_THK


@operator("pkm_lightning::product_search")
def _search(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the sums, their slots, the candidate pairs that they are, and the sub-keys of both halves."""
    kernels = load_kernels("product_search", "cpu")
    sums_THK, ids_THK, chosen_THK, indices_TXJ = kernels.search(q.contiguous(), keys.contiguous(), k)
    return sums_THK, ids_THK, chosen_THK, indices_TXJ


@operator("pkm_lightning::product_search_backward")
def _search_backward(
    grad: Tensor, sums: Tensor, chosen: Tensor, indices: Tensor, q: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    kernels = load_kernels("product_search", "cpu")
    q_grad_TH2F, keys_grad_Y2SF = kernels.gradients(
        grad.contiguous(), sums, chosen, indices, q.contiguous(), keys.contiguous()
    )
    return q_grad_TH2F, keys_grad_Y2SF


@_search.register_fake
def _(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, halves, _ = q.shape
    ids, chosen = (q.new_empty(tokens, heads, k, dtype=torch.int32) for _ in range(2))
    indices = q.new_empty(tokens, heads * halves, min(k, keys.shape[2]), dtype=torch.int32)
    return q.new_empty(tokens, heads, k), ids, chosen, indices


@_search_backward.register_fake
def _(grad: Tensor, sums: Tensor, chosen: Tensor, indices: Tensor, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), keys.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, ...]) -> None:
    sums_THK, *integers = output
    ctx.mark_non_differentiable(*integers)
    _, chosen_THK, indices_TXJ = integers
    ctx.save_for_backward(sums_THK, chosen_THK, indices_TXJ, *inputs[:2])


def _backward(ctx: Any, grad_THK: Tensor, *_integers: Any) -> tuple[Tensor, Tensor, None]:
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels; the FLOP counter sees it too.
    q_grad_TH2F, keys_grad_Y2SF = _search_backward(grad_THK, *ctx.saved_tensors)
    return q_grad_TH2F, keys_grad_Y2SF, None


_search.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.pkm_lightning.product_search)
def _flops(q_shape: tuple[int, ...], keys_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, heads, halves, dim = q_shape
    return 2 * tokens * heads * halves * keys_shape[2] * dim


@register_flop_formula(torch.ops.pkm_lightning.product_search_backward)
def _backward_flops(
    _grad: Any, _sums: Any, _chosen: Any, indices_shape: tuple[int, ...], q_shape: tuple[int, ...], *_: Any, **__: Any
) -> int:
    tokens, entries, per_half = indices_shape
    return 4 * tokens * entries * per_half * q_shape[3]
