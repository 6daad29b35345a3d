"""The tolerances of all tests. A test that needs a looser one has found a defect, so there are no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

# By dtype, (rtol, atol). Values allow for a few roundings of the dtype; gradients, which are sums of many products, for
# at least twice as many.
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

#: Relative difference between training with one process and with several, in float32. They differ in the order of
#: additions, which up to 30 steps of Adam amplify. `norm` is for norms of gradients.
RANKS = {"loss": 1e-5, "norm": 1e-3}
#: Relative norm of what two devices compute in fp32 from the same numbers. They differ in the order of additions; one
#: product in TF32 or half precision would give 1e-4 or more.
DEVICES = 1e-5
#: Decoding with a cache against a full forward, both in bf16: another order of additions may round a score to the other
#: side of a slot or an expert, or of an equally likely token. Relative norm of logits, and share of other tokens.
BF16_DECODING = {"logits": 0.06, "tokens": 0.05}
#: Absolute difference between the ends of two bootstrap intervals, each from some thousand resamples of a mean of a few
#: hundred values.
BOOTSTRAP = 0.012
#: Relative difference between a variance over thousands of resamples of some hundred coins and the formula: the coins
#: themselves are one random draw.
SAMPLED_VARIANCE = 0.2
#: Relative difference between planned and allocated bytes: a plan leaves out what lives for a single operation.
COUNTED_MEMORY = 0.03
#: Relative difference between two formulas in float64.
EXACT_FLOAT = 1e-12


def assert_close(actual: Tensor, expected: Tensor, *, kind: Literal["value", "grad"] = "value") -> None:
    """Asserts that `actual` equals `expected` to the tolerance of `actual`'s dtype.

    Shapes must agree, and NaN equals nothing. `expected` may have a wider dtype (a float64 reference); the two are
    compared in the wider one, without rounding.
    """
    rtol, atol = {"value": VALUE, "grad": GRAD}[kind][actual.dtype]
    wider = torch.promote_types(actual.dtype, expected.dtype)
    torch.testing.assert_close(actual.to(wider), expected.to(wider), rtol=rtol, atol=atol)


def assert_same_on_devices(actual: Tensor, expected: Tensor, name: str) -> None:
    """Asserts that a tensor of a GPU equals that of the CPU as a whole, in fp32.

    Single values may be far from each other in relative terms where large summands cancel.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    assert actual.shape == expected.shape, name
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    assert difference <= DEVICES * size, f"{name}: differs by {difference / max(size, 1e-30):.1e} of its norm"


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Asserts that the gradients of both outputs in every input agree, and that no expected gradient is all zero."""
    upstream = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(actual, list(inputs.values()), upstream.to(actual.dtype))
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, grad, expected_grad in zip(inputs, actual_grads, expected_grads, strict=True):
        assert expected_grad.any(), f"the test gives no gradient to {name}"
        assert_close(grad, expected_grad, kind="grad")
