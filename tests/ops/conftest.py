"""For every test of an op: memory that is not written holds NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_backends import device_of


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # In torch's deterministic mode `torch.empty` fills its memory with NaN, or with the largest integer.
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def on_the_backends_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Creates tensors on the device of the test's `backend`."""
    with torch.device(device_of(request.node.callspec.params["backend"])):
        yield
