"""RMSNorm through the package's kernel against torch's module.

Letters: C values that are normalised together.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import nn

from pkm_lightning.memory.norm import RMSNorm


@pytest.mark.parametrize("eps", [1e-3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_norm_of_torch(dtype: torch.dtype, eps: float | None) -> None:
    norm, other = RMSNorm(6, eps=eps, dtype=dtype), nn.RMSNorm(6, eps=eps, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
    other.load_state_dict(norm.state_dict())
    x_C = (torch.randn(2, 3, 6) / 50).to(dtype).requires_grad_()
    upstream_C = torch.randn(2, 3, 6).to(dtype)
    results = []
    for module in (norm, other):
        y_C = module(x_C)
        results.append((y_C, *torch.autograd.grad(y_C, (x_C, module.weight), upstream_C)))
    for (one, expected), kind in zip(zip(*results, strict=True), ("value", "grad", "grad"), strict=True):
        assert one.dtype is dtype
        assert_close(one, expected.detach(), kind=kind)
