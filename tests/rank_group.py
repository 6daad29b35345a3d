"""A group of processes that run one job after another, so that many distributed tests pay for one start.

A job is a function of this tests' package, by module and name, and its arguments; each rank runs it and answers.
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

_START = multiprocessing.get_context("spawn")


class JobError(AssertionError):
    """A job failed on some rank; the message holds the tracebacks."""


class Group:
    """`size` ranks on this machine, connected over gloo."""

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
        """What each rank returned."""
        for pipe in self._pipes:
            pipe.send((job.__module__, job.__name__, arguments, named))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise JobError(f"rank {rank} gave no answer in {timeout} s: a deadlock?")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self.close()  # the others may wait in a collective
            raise JobError("\n".join(failures))
        return [answer for _, answer in answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Groups:
    """Groups by size, started when first asked for and started anew after a failure."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}

    def __call__(self, size: int) -> Group:
        if size not in self._groups or not self._groups[size].alive:
            self._groups[size] = Group(size)
        return self._groups[size]


@contextmanager
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    for group in made._groups.values():
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
