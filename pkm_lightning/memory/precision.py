"""The precision of scores: IEEE fp32, whatever the precision of the model, because top-k compares them.

In bf16 the scores at the border of the top 32 tie for about two thirds of the queries, and TF32 differs between
devices: both would select other slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def score_dtype(x: Tensor) -> torch.dtype:
    """Returns fp32, or fp64 for an fp64 model."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@contextlib.contextmanager
def ieee_scores(x: Tensor) -> Iterator[None]:
    """Disables autocast on the device of `x`, and TF32 in CUDA matmuls, inside the context."""
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    if tf32:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        # torch has no autocast for the meta device, on which the cost of models is computed. Where autocast is off,
        # as in every fp32 model, switching it off would take longer than what small layers compute under it.
        is_off = x.is_meta or not torch.is_autocast_enabled(x.device.type)
        with contextlib.nullcontext() if is_off else torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
