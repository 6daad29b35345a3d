"""Peak memory of one way alone: the allocator's on a GPU, the resident memory of a process of its own on the CPU."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.case import Case, Factory, Skipped


def peak_memory(case: Case | None, make: Factory, make_tiny: Factory, way: str, device: torch.device) -> int | None:
    """Measures the peak bytes of a way above the inputs of its case.

    Args:
        case: the case if it exists already; a GPU measures it in place.
        make: makes the case.
        make_tiny: makes a tiny case of the same ways.
        way: name of the way.
        device: where it runs.

    Returns:
        Bytes; None where the system does not report them.
    """
    if device.type == "cuda":
        return _peak_on_gpu(case or make(), way)
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Children are forked from a server that has imported everything and started no thread: a plain fork of this
    # process could inherit a lock that one of its threads holds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "numba", "torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_this_process, make, make_tiny, way, torch.get_num_threads()).result()


def _run_twice(case: Case | Skipped, way: str, start: Callable[[], None]) -> None:
    assert isinstance(case, Case)
    build = next(one.build for one in case.ways if one.name == way)
    gc.collect()
    start()
    run = build()
    for _ in range(2):
        run()


def _peak_on_gpu(case: Case | Skipped, way: str) -> int:
    before: list[int] = []

    def start() -> None:
        torch.cuda.reset_peak_memory_stats()
        before.append(torch.cuda.memory_allocated())

    _run_twice(case, way, start)
    return torch.cuda.max_memory_allocated() - before[0]


def _peak_in_this_process(make: Factory, make_tiny: Factory, way: str, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _run_twice(make_tiny(), way, lambda: None)  # loads code, which is not memory of the way
    before: list[int] = []

    def start() -> None:
        before.append(resident_memory("VmRSS"))
        reset_peak()

    _run_twice(make(), way, start)
    return resident_memory("VmHWM") - before[0]


def reset_peak() -> None:
    """Makes Linux forget the peak resident memory (`VmHWM`) of this process."""
    # "5" resets the peak and nothing else (man proc_pid_clear_refs).
    Path("/proc/self/clear_refs").write_text("5")


def resident_memory(field: str) -> int:
    """Reads memory of this process in bytes from /proc.

    Args:
        field: `VmRSS`, resident now; `VmHWM`, its peak; `RssAnon`, the part that no file backs.

    Raises:
        RuntimeError: the system does not report the field.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
