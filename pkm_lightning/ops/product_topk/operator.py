"""product_combine as custom operators that torch can trace; the gradient reaches the chosen pairs only.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: X any leading shape, R rows, J sub-keys kept per half, C candidate pairs; K slots kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator
from pkm_lightning.ops.product_topk.candidates import cached_ranks


def product_combine_kernels(
    values1_XJ: Tensor,
    indices1_XJ: Tensor,
    values2_XJ: Tensor,
    indices2_XJ: Tensor,
    n_keys: int,
    k: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.product_combine` by the kernels of `backend`, `cpu` or `triton`."""
    sums_XK, ids_XK, _ = _combine(values1_XJ, indices1_XJ.int(), values2_XJ, indices2_XJ.int(), n_keys, k, backend)
    return sums_XK, ids_XK


@operator("pkm_lightning::product_combine")
def _combine(
    values1: Tensor, indices1: Tensor, values2: Tensor, indices2: Tensor, n_keys: int, k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums, their slots, and the candidate pairs that they are, which the backward needs."""
    (*shape_X, per_half), rows = values1.shape, values1.shape[:-1].numel()
    halves_RJ = [half.reshape(rows, per_half).contiguous() for half in (values1, indices1, values2, indices2)]
    results_RK = (values1.new_empty(rows, k), indices1.new_empty(rows, k), indices1.new_empty(rows, k))
    if rows:
        kernels = load_kernels("product_topk", backend)
        kernels.combine_rows(*halves_RJ, *cached_ranks(k, per_half, values1.device), n_keys, *results_RK)
    sums_XK, ids_XK, chosen_XK = (result.view(*shape_X, k) for result in results_RK)
    return sums_XK, ids_XK, chosen_XK


@operator("pkm_lightning::product_combine_backward")
def _combine_backward(grad: Tensor, sums: Tensor, chosen: Tensor, per_half: int, backend: str) -> tuple[Tensor, Tensor]:
    (*shape_X, k), rows = grad.shape, grad.shape[:-1].numel()
    inputs_RK = [part.reshape(rows, k).contiguous() for part in (grad, sums, chosen)]
    results_RJ = grad.new_empty(rows, per_half), grad.new_empty(rows, per_half)
    if rows:
        kernels = load_kernels("product_topk", backend)
        kernels.add_to_halves(*inputs_RK, *cached_ranks(k, per_half, grad.device), *results_RJ)
    grad1_XJ, grad2_XJ = (result.view(*shape_X, per_half) for result in results_RJ)
    return grad1_XJ, grad2_XJ


@_combine.register_fake
def _(
    values1: Tensor, indices1: Tensor, values2: Tensor, indices2: Tensor, n_keys: int, k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*values1.shape[:-1], k)
    return values1.new_empty(shape), indices1.new_empty(shape), indices1.new_empty(shape)


@_combine_backward.register_fake
def _(grad: Tensor, sums: Tensor, chosen: Tensor, per_half: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*grad.shape[:-1], per_half)
    return grad.new_empty(shape), grad.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    sums_XK, ids_XK, chosen_XK = output
    ctx.per_half, ctx.backend = inputs[0].shape[-1], inputs[-1]
    ctx.mark_non_differentiable(ids_XK, chosen_XK)
    ctx.save_for_backward(sums_XK, chosen_XK)


def _backward(ctx: Any, grad_XK: Tensor, _ids: Any, _chosen: Any) -> tuple[Tensor | None, ...]:
    # An operator of its own: AOTAutograd traces this function and cannot trace kernels.
    grad1_XJ, grad2_XJ = _combine_backward(grad_XK, *ctx.saved_tensors, ctx.per_half, ctx.backend)
    return grad1_XJ, None, grad2_XJ, None, None, None, None


_combine.register_autograd(_backward, setup_context=_setup_context)
