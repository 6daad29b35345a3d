"""The threads of a kernel share its tasks: each task once, in the order of the threads, and all arguments as passed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

numba = pytest.importorskip("numba")

from pkm_lightning.ops.numba_arrays import numpy_view  # noqa: E402  they need numba
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share  # noqa: E402
from pkm_lightning.ops.numba_threads import use_torch_threads  # noqa: E402


@numba.njit(**{**KERNEL, "cache": False})
def _add(start, runs_N, addend, firsts_N, worker):  # type: ignore[no-untyped-def]
    first, last = share(runs_N.shape[0], worker)
    for n in range(first, last):
        runs_N[n] += start + addend
        firsts_N[n] = first


def shares(tasks: int, threads: int) -> list[int]:
    """Returns the first task of the share that each task is in."""
    torch.set_num_threads(threads)
    try:
        use_torch_threads()
        runs_N, firsts_N = torch.zeros(tasks, dtype=torch.float64), torch.full((tasks,), -1)
        _add(3, numpy_view(runs_N), 0.5, numpy_view(firsts_N), ALL)
    finally:
        torch.set_num_threads(1)
    assert runs_N.tolist() == [3.5] * tasks
    firsts: list[int] = firsts_N.tolist()
    return firsts


def check() -> None:
    """Shares tasks among one thread and, where numba has them, two."""
    for threads in {1, min(2, numba.config.NUMBA_NUM_THREADS)}:
        assert shares(0, threads) == []
        assert shares(1, threads) == [0]
        assert shares(1001, threads) == ([0] * 1001 if threads == 1 else [0] * 500 + [500] * 501)


def test_each_task_is_done_once_by_the_thread_whose_share_it_is_in() -> None:
    check()


@pytest.mark.slow
def test_the_same_with_the_threads_that_numba_brings_itself() -> None:
    program = "import test_numba_kernels as t, numba; t.check(); print(numba.threading_layer())"
    environment: dict[str, Any] = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "workqueue\n", done.stderr
