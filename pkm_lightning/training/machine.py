"""What a run ran on and when: versions of the libraries, commit, processor or GPU, peak memory, time."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import pkm_lightning


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that its results depend on."""
    names = ("torch", "lightning", "hydra-core", "numpy", "tokenizers", "triton")
    installed = {"python": platform.python_version(), "pkm_lightning": pkm_lightning.__version__}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """Returns the git commit of the checkout that this package runs from, with `+dirty` if files differ; else None."""
    package = Path(pkm_lightning.__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=package, capture_output=True, check=False
        )
        if tracked.returncode:
            return None
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=package, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def now() -> str:
    """Returns the UTC time to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or that of the CPU with the number of cores that the system has."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{cpu_name() or 'CPU'}, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def cpu_name() -> str:
    """Returns the processor's name from Linux, elsewhere from Python; it may be empty."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def reset_peak_memory() -> None:
    """Starts the measurement anew, so that earlier jobs of this process do not count; on Linux and on GPUs."""
    with contextlib.suppress(OSError):
        # 5 resets VmHWM, the peak of resident memory (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak of a GPU's allocator, else of the process's resident memory, since `reset_peak_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024
