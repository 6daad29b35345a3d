"""Choice of the implementation of an op: the caller names a backend, or `auto` takes the fastest one that can run.

| backend | device | needs |
|---|---|---|
| `reference` | any | nothing; naive, for tests |
| `eager` | any | nothing; torch operations |
| `cpu` | CPU; the meta device, for shapes | numba, the extra `pkm_lightning[cpu]` |
| `triton` | CUDA; CPU under TRITON_INTERPRET=1 | triton |
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
Implementation = TypeVar("Implementation", bound=Callable[..., object])

#: The operators around the kernels also run on the meta device, where only shapes are computed.
_SHAPES_OF_CPU = ("cpu", "meta")
# `find_spec` looks the packages up without importing them, which would take seconds.
HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def best_backend(x: Tensor) -> str:
    """Returns the fastest backend that is installed for tensors on the device of `x`."""
    if x.is_cuda and HAS_TRITON:
        return "triton"
    return "cpu" if x.device.type in _SHAPES_OF_CPU and HAS_NUMBA else "eager"


def choose_backend(
    op: str, backend: str, default: str, available: Mapping[str, Implementation], x: Tensor
) -> Implementation:
    """Returns the implementation of `op` that `backend` names; `auto` means `default`.

    Args:
        op: name of the op, for messages.
        backend: the backend that the caller asks for.
        default: the backend that `auto` stands for; usually `best_backend(x)`.
        available: implementations by the name of their backend.
        x: an input of the op; its device decides which backends can run.

    Raises:
        ValueError: `backend` is not among `available`, or cannot run here; the message names what is missing.
    """
    name = default if backend == "auto" else backend
    if name not in available:
        raise ValueError(f"{op}: backend={backend!r} is not available; allowed: auto, {', '.join(available)}.")
    missing = _missing(name, x)
    if missing:
        raise ValueError(f"{op}: backend={name!r} needs {missing}; use backend=eager, which runs everywhere.")
    # Dynamo can trace neither a call of a logger nor a cached function; both would break the graph.
    if not torch.compiler.is_compiling():
        _log_once(op, name)
    return available[name]


@functools.cache
def load_kernels(op: str, backend: str) -> ModuleType:
    """Imports and returns the module `pkm_lightning.ops.<op>.<backend>`.

    Operators call it when they run: importing numba and triton takes seconds, which only a user of their kernels pays.
    """
    return importlib.import_module(f"pkm_lightning.ops.{op}.{backend}")


def _missing(name: str, x: Tensor) -> str | None:
    """Returns what the backend `name` lacks to run on the device of `x`, None if nothing."""
    if name == "cpu":
        if x.device.type not in _SHAPES_OF_CPU:
            return f"tensors on the CPU, got {x.device}"
        return None if HAS_NUMBA else "numba (pip install 'pkm_lightning[cpu]')"
    if name == "triton":
        if not HAS_TRITON:
            return "triton"
        # Tests run the kernels in Triton's interpreter on machines without a GPU.
        interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if x.is_cuda or interpreted else f"tensors on a CUDA device, got {x.device}"
    return None


@functools.cache
def _log_once(op: str, name: str) -> None:
    _log.debug("%s uses the %s backend", op, name)
