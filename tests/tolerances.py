"""The one table of tolerances. A test that needs a looser one explains a defect, so there are no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

# dtype -> (rtol, atol). Values: a few roundings of the dtype; gradients: sums of many products, twice that or more.
VALUE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 1e-3),
}
GRAD = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (3.2e-2, 2e-2),
    torch.float16: (4e-3, 2e-3),
}

#: Relative, between one process and several in fp32: what is left is the order of additions, which 30 steps of Adam
#: carry on. The norms are those of gradients.
RANKS = {"loss": 1e-5, "norm": 1e-3}
#: Ends of an interval from two bootstraps of some thousand resamples, absolute; of means of a few hundred values.
BOOTSTRAP = 0.012
#: Variance over thousands of resamples of some hundred coins against the formula, relative: the coins are one draw.
SAMPLED_VARIANCE = 0.2
#: A formula in float64 against another, relative.
EXACT_FLOAT = 1e-12


def assert_close(actual: Tensor, expected: Tensor, *, kind: Literal["value", "grad"] = "value") -> None:
    """`actual` equals `expected` to the tolerance of `actual`'s dtype; NaN equals nothing, shapes must agree.

    `expected` may come in a wider dtype (a float64 reference); the two are compared in the wider one, unrounded.
    """
    rtol, atol = {"value": VALUE, "grad": GRAD}[kind][actual.dtype]
    wider = torch.promote_types(actual.dtype, expected.dtype)
    torch.testing.assert_close(actual.to(wider), expected.to(wider), rtol=rtol, atol=atol)


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """The gradients of both outputs in every named input agree, and none of them is zero altogether."""
    upstream = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(actual, list(inputs.values()), upstream.to(actual.dtype))
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, grad, expected_grad in zip(inputs, actual_grads, expected_grads, strict=True):
        assert expected_grad.any(), f"the test gives no gradient to {name}"
        assert_close(grad, expected_grad, kind="grad")
