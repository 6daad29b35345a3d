"""For every test: shapes checked, torch seeded, threads limited; GPU tests are skipped where there is no GPU."""

from __future__ import annotations

import os

import shape_checks

shape_checks.install()

import pytest  # noqa: E402  the checks come before anything could import the package
import torch  # noqa: E402

# Threads that fight for shared cores cost far more than they bring; the processes that tests start inherit the limit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False here")
