"""Ranks started externally, as torchrun and SLURM start them, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from small import SMALL_RUN

DDP = ["strategy=ddp", "trainer.devices=2"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(command: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def torchrun(*options: str, command: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Starts one agent of torchrun."""
    return _start([sys.executable, "-m", "torch.distributed.run", *options, *command], cwd, {})


def srun(*overrides: str, cwd: Path, tasks: int = 2, nodes: int = 1) -> list[subprocess.Popen[str]]:
    """Starts what srun would, `tasks` on each node, with the variables that it would set."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": str(tasks * nodes),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "pkm_lightning", "fit", *overrides]
    started = []
    for rank in range(tasks * nodes):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % tasks, "SLURM_NODEID": rank // tasks}
        started.append(_start(command, cwd, {**shared, **{name: str(value) for name, value in own.items()}}))
    return started


def small_fit(*overrides: str) -> list[str]:
    """Returns the command that torchrun starts in every rank."""
    return ["-m", "pkm_lightning", "fit", *SMALL_RUN, *DDP, *overrides]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Waits for the processes; returns the exit code and output of each."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]
