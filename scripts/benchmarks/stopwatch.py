"""Times calls with caches that hold none of their inputs."""

from __future__ import annotations

import gc
import time

import torch

from benchmarks.case import Run


class Stopwatch:
    """Clock of calls, which overwrites the caches before each.

    Args:
        device: where the calls run.
        sweep_bytes: bytes that are written before each call; more than the caches hold.
        cpu_time: measure the CPU time of all threads of the process instead of the time that passes.
    """

    def __init__(self, device: torch.device, sweep_bytes: int, *, cpu_time: bool = False) -> None:
        self.is_cuda = device.type == "cuda"
        self._now = time.process_time if cpu_time else time.perf_counter
        self._sweep = torch.zeros(sweep_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Run, calls: int = 1) -> float:
        """Returns the mean seconds over `calls`; results are freed outside the timed part."""
        total = 0.0
        for _ in range(calls):
            # Layers of a model meet caches that other layers have filled; repeated calls alone would keep them warm.
            self._sweep.add_(1)
            total += self._event_seconds(run) if self.is_cuda else self._host_seconds(run)
        return total / calls

    def _host_seconds(self, run: Run) -> float:
        start = self._now()
        result = run()
        seconds = self._now() - start
        del result
        return seconds

    @staticmethod
    def _event_seconds(run: Run) -> float:
        # Kernels are asynchronous: a wall clock would measure how fast Python launches them.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def copy_bandwidth(self) -> float:
        """Measures bytes per second, read and written, of copying half the swept memory into the other half."""
        source, target = self._sweep.chunk(2)
        return 2 * len(source) / self(lambda: target.copy_(source))


def free_memory(device: torch.device) -> None:
    """Returns unreferenced memory to the system or the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
