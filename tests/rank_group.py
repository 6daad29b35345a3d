"""A group of processes that run one job after another, so that many distributed tests pay for one start.

A job is a function of a module in tests/, sent by name, and its arguments. Each rank runs it and returns the result.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

# Ranks are forked from a server that imported the package once, since the imports cost more than most jobs. The server
# runs nothing else, so it has no threads that a fork would lose.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["pkm_lightning.cli.assembly", "pkm_lightning.callbacks", "numba"])


class JobError(AssertionError):
    """The failure of a job on some rank; the message holds the tracebacks."""


class Group:
    """A group of `size` ranks on this machine, connected over gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = _START.Pipe()
            process = _START.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = 120.0, **named: Any) -> list[Any]:
        """Runs `job` on all ranks; returns the result of each."""
        for pipe in self._pipes:
            pipe.send((job.__module__, job.__name__, arguments, named))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise JobError(f"rank {rank} gave no result within {timeout} s: a deadlock?")
            results.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(results) if failed]
        if failures:
            self.close()  # the other ranks may wait in a collective
            raise JobError("\n".join(failures))
        return [result for _, result in results]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Groups:
    """Groups by size, each started at its first use and again after a failure."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}

    def __call__(self, size: int) -> Group:
        if size not in self._groups or not self._groups[size].alive:
            self._groups[size] = Group(size)
        return self._groups[size]


@contextmanager
def groups() -> Iterator[Groups]:
    started = Groups()
    yield started
    for group in started._groups.values():
        group.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), NODE_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    while True:
        try:
            module, name, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(importlib.import_module(module), name)(*arguments, **named)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
