"""grouped_linear by `torch.nn.functional.grouped_mm`: one kernel for bf16 on recent GPUs, elsewhere torch's fallback.

Letters: M rows, E groups, I values in, O values out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Bytes of which each row of an operand must be a multiple; torch's kernel requires it (TMA loads 16 bytes at a time).
_ALIGNMENT = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x_MI: Tensor, weight_EIO: Tensor) -> str | None:
    """Returns why `grouped_mm` cannot take these operands, None if it can."""
    dtype = str(x_MI.dtype).removeprefix("torch.")
    if x_MI.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if x_MI.is_meta and x_MI.dtype is not torch.bfloat16:
        return f"on the meta device it takes bfloat16 only, not {dtype}"
    for width in weight_EIO.shape[1:]:
        row_bytes = width * x_MI.element_size()
        if row_bytes % _ALIGNMENT:
            return f"its rows must be multiples of {_ALIGNMENT} bytes, and {width} values of {dtype} are {row_bytes}"
    return None


def grouped_linear_grouped_mm(x_MI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.grouped_linear` by torch's grouped_mm; the host does not read the counts."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    y_MO = torch.nn.functional.grouped_mm(x_MI.contiguous(), weight_EIO.contiguous(), offs=ends_E)
    result: Tensor = _ContiguousGradient.apply(y_MO)
    return result


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient: the backward of grouped_mm refuses the expanded one of a sum or a mean."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
