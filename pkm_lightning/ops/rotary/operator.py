"""rotary as a custom operator that torch can trace: one pass forward, and one backward by the opposite angles.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator


def rotary_kernel(x_BTHC: Tensor, cos_ITF: Tensor, sin_ITF: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.rotary` by the kernel; all in float32."""
    y_BTHC: Tensor = _rotate(x_BTHC, cos_ITF, sin_ITF, False)
    return y_BTHC


@operator("pkm_lightning::rotary")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y_BTHC: Tensor = load_kernels("rotary", "cpu").rotate(x.contiguous(), cos.contiguous(), sin.contiguous(), inverse)
    return y_BTHC


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos_ITF, sin_ITF, ctx.inverse = inputs
    ctx.save_for_backward(cos_ITF, sin_ITF)


def _backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, None, None, None]:
    return _rotate(grad_BTHC, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_backward, setup_context=_setup_context)
