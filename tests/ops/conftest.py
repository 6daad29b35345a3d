"""For every test of an op: memory that is not written holds NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # In torch's deterministic mode `torch.empty` fills its memory with NaN, or with the largest integer.
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")
