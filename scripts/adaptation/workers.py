"""Processes that do the jobs of a comparison, one thread each: as many at a time as there are cores to give."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType

import torch
from commands import CommandFailed

from pkm_lightning.errors import PkmError

Job = Callable[[], None]


class Workers:
    """A pool of processes, each with the package imported once: a start of Python costs more than many of the jobs.

    One thread per process, so that the same commands give the same bits whatever the number of processes.

    Args:
        processes: jobs at a time, 1 or more.
    """

    def __init__(self, processes: int) -> None:
        # Before numerical libraries are imported by the new processes.
        os.environ["OMP_NUM_THREADS"] = "1"
        self.processes = processes
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, str | None]]:
        """Does all jobs, in this order as far as possible, and yields the name of each that has ended.

        Yields:
            The name and None, or the message of a command that has failed.
        """
        names = {self._pool.submit(_message_of, job): name for name, job in jobs.items()}
        for future in as_completed(names):
            yield names[future], future.result()


def _prepare() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # A kill of the comparison leaves none of its processes behind.
    os._exit(1)


def _message_of(job: Job) -> str | None:
    try:
        job()
    except (CommandFailed, PkmError) as error:
        return str(error)
    finally:
        gc.collect()
    return None
