"""The zero-centred norm of equal parts against torch's RMSNorm of each part."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional

from pkm_lightning.memory.grouped_norm import GroupedRMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_are_normalised_alone(dtype: torch.dtype) -> None:
    norm = GroupedRMSNorm(dim=12, groups=3, eps=1e-3).to(dtype)
    assert not norm.weight.any()
    torch.nn.init.normal_(norm.weight)
    x_TD = torch.randn(5, 12, dtype=dtype) * torch.tensor([1.0] * 4 + [100.0] * 8).to(dtype)
    y_TD = norm(x_TD)
    assert y_TD.dtype is dtype
    wide_TD, weight_D = x_TD.double(), norm.weight.double()
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        expected = functional.rms_norm(wide_TD[:, part], (4,), 1 + weight_D[part], eps=1e-3)
        assert_close(y_TD[:, part], expected)
