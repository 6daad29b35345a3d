"""The content of run.json: what a run was, what it cost and what it reached. Reports read it without building a model.

| key | meaning |
|---|---|
| schema | version of this table |
| status | running, finished, failed (with `reason`), interrupted |
| ffn, seed, precision, world_size, threads, device | what ran where |
| params | total, active (parameters of one token's arithmetic), table |
| flops_per_token | train and decode of the whole model, trunk likewise; unembedding counts at every position, though |
| | training leaves it out where there is no target |
| bytes_per_token | train (the rows that each token moves) and decode (parameters read at batch 1) |
| tokens, seconds, tokens_per_second | real input tokens, {train, total} over all sittings |
| throughput | the last figures of `pkm_lightning.callbacks.Throughput`, without checkpoints' time; None without it |
| peak_memory_bytes | of the process, or of the device where it is a GPU |
| versions, commit | of the libraries; of the working directory, if it is this package's checkout |
| data, facts | fingerprint of the data set; number of facts that training shows, where the data module has `n_facts` |
| started, ended | UTC, ISO 8601 |
| best_validation | lowest loss of the validations in training and its step; None without one |
| metrics | of the final test; recall by form, relation and decile under `recall` |

`start_record` has what is known before training, `pkm_lightning.callbacks.RunRecord` collects the rest, and `fit` adds
how the run ended.
"""

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
from typing import Any

import torch

import pkm_lightning
from pkm_lightning.model import ModelCost

SCHEMA = 1


def start_record(config: dict[str, Any], cost: ModelCost) -> dict[str, Any]:
    """Returns the record at the start of a run, with `"status": "running"`."""
    return {
        "schema": SCHEMA,
        "status": "running",
        "ffn": config["ffn"]["_target_"].rsplit(".", 1)[-1],
        "seed": config["seed"],
        "params": {"total": cost.params_total, "active": cost.params_active, "table": cost.table_params},
        "flops_per_token": {
            "train": cost.train_flops,
            "decode": cost.model_flops,
            "trunk": {"train": 3 * cost.trunk_train_flops, "decode": cost.trunk_flops},
        },
        "bytes_per_token": {"train": cost.train_bytes, "decode": cost.decode_bytes},
        "unknown_cost": list(cost.unknown),
        "tokens": 0,
        "seconds": {"train": 0.0, "total": 0.0},
        "tokens_per_second": None,
        "throughput": None,
        "peak_memory_bytes": None,
        "device": None,
        "versions": versions(),
        "commit": commit(),
        "precision": str(config["trainer"]["precision"]),
        "world_size": None,
        "threads": torch.get_num_threads(),
        "data": None,
        "facts": None,
        "started": now(),
        "ended": None,
        "best_validation": None,
        "metrics": {},
    }


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
