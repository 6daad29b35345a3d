"""The grouped linear map through `torch.nn.functional.grouped_mm`: one kernel for bf16 on recent GPUs, else a fallback.

Letters: M rows, E groups, I values in, O values out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x_MI: Tensor, weight_EIO: Tensor) -> str | None:
    """Why `grouped_mm` cannot take these operands, or None."""
    if x_MI.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(x_MI.dtype).removeprefix('torch.')}"
    if x_MI.is_meta and x_MI.dtype is not torch.bfloat16:
        return f"on the meta device it takes bfloat16 only, not {str(x_MI.dtype).removeprefix('torch.')}"
    for width in weight_EIO.shape[1:]:
        if width * x_MI.element_size() % _ALIGNMENT:
            return (
                f"its rows must be multiples of {_ALIGNMENT} bytes, and {width} values of "
                f"{str(x_MI.dtype).removeprefix('torch.')} are {width * x_MI.element_size()}"
            )
    return None


def grouped_linear_grouped_mm(x_MI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """See `pkm_lightning.ops.grouped_linear`."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    y_MO = torch.nn.functional.grouped_mm(x_MI.contiguous(), weight_EIO.contiguous(), offs=ends_E)
    result: Tensor = _ContiguousGradient.apply(y_MO)
    return result


class _ContiguousGradient(torch.autograd.Function):
    """The identity; grouped_mm's backward refuses the expanded gradient that a sum or a mean sends."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
