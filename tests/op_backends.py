"""The backends of the ops, and the device on which a test runs each of them."""

from __future__ import annotations

import torch

BACKENDS = ["cpu", "triton", "eager", "reference"]


def device_of(backend: str) -> str:
    """Returns the device for a backend: without a GPU, the Triton kernels run in the interpreter on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
