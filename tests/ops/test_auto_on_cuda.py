"""`auto` on CUDA tensors takes a backend that the op has: shapes only, on fake tensors, so that no GPU is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pkm_lightning import ops
from pkm_lightning.ops import gathered_rows, row_gradients, row_update, segments


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda")


def _ids(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


CALLS: dict[str, Callable[[], object]] = {
    "causal_convolution": lambda: ops.causal_convolution(_floats(2, 5, 4), _floats(4, 3), dilation=1),
}
