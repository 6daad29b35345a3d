"""A group of processes that run one job after another, so that many distributed tests share one start of processes.

A job is a function of a test module, sent by module and name, with its arguments; each rank runs it and sends back the
result.
"""

from __future__ import annotations

import gc
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
    """Failure of a job on some ranks; the message has their tracebacks."""


class Group:
    """`size` processes on this machine, the ranks of a gloo process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        # The kernel picks a free port. Another process could take it before rank 0 does, but rarely will.
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
        """Runs `job(*arguments, **named)` on every rank and returns the results in the order of the ranks.

        Raises:
            JobError: a rank raised, or sent no result within `timeout` seconds. The group is closed then.
        """
        for pipe in self._pipes:
            pipe.send((job.__module__, job.__name__, arguments, named))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise JobError(f"rank {rank} sent no result in {timeout} s: a deadlock?")
            results.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(results) if failed]
        if failures:
            self.close()  # the other ranks may be waiting in a collective
            raise JobError("\n".join(failures))
        return [result for _, result in results]

    @property
    def alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Stops the processes by SIGKILL: a rank in a collective would not react to anything else."""
        for process in self._processes:
            process.kill()
            process.join()


class Groups:
    """Groups by size, each started when it is first requested, and again after a failure."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}

    def __call__(self, size: int) -> Group:
        if size not in self._groups or not self._groups[size].alive:
            self._groups[size] = Group(size)
        return self._groups[size]


@contextmanager
def groups() -> Iterator[Groups]:
    """Yields groups and closes them at the end."""
    by_size = Groups()
    yield by_size
    for group in by_size._groups.values():
        group.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), NODE_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0",
    )  # fmt: skip
    # Imported here, in the spawned process, after the variables above are set.
    import compile_once
    import compositions
    import logged_figures
    import torch
    import torch.distributed as dist

    compile_once.compile_in_turn()
    compositions.keep_compositions()
    logged_figures.leave_on_the_cpu()
    gc.freeze()  # a collection that walked over what the server has imported would copy its pages
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # as in conftest.py
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
