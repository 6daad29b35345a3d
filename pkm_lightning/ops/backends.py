"""Which implementation of an op runs: named by the caller, or `auto`; chosen explicitly and logged once.

| backend | where | needs |
|---|---|---|
| `reference` | any device | nothing: naive, for tests |
| `eager` | any device | nothing: torch operations |
| `cpu` | CPU | numba, the extra `pkm_lightning[cpu]` |
| `triton` | CUDA; the CPU under TRITON_INTERPRET=1 | triton |
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
Implementation = TypeVar("Implementation", bound=Callable[..., object])

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def best_backend(x: Tensor) -> str:
    """What `auto` takes for tensors that lie where `x` does: the fastest that is installed."""
    if x.is_cuda and HAS_TRITON:
        return "triton"
    return "cpu" if x.device.type == "cpu" and HAS_NUMBA else "eager"


def choose_backend(
    op: str, backend: str, default: str, available: Mapping[str, Implementation], x: Tensor
) -> Implementation:
    """The implementation of `op` that `backend` names; `auto` means `default`.

    Args:
        op: name of the op, for messages.
        backend: what the caller asks for.
        default: the backend that `auto` means; usually `best_backend(x)`.
        available: implementations by name.
        x: an input, for the device.

    Raises:
        ValueError: `backend` is not among `available`, or cannot run here; the message says what is missing.
    """
    name = default if backend == "auto" else backend
    if name not in available:
        raise ValueError(f"{op}: backend={backend!r} is not available; allowed: auto, {', '.join(available)}.")
    missing = _missing(name, x)
    if missing:
        raise ValueError(f"{op}: backend={name!r} needs {missing}; use backend=eager, which runs everywhere.")
    if not torch.compiler.is_compiling():
        _announce(op, name)
    return available[name]


def _missing(name: str, x: Tensor) -> str | None:
    if name == "cpu":
        if x.device.type != "cpu":
            return f"tensors on the CPU, got {x.device}"
        return None if HAS_NUMBA else "numba (pip install 'pkm_lightning[cpu]')"
    if name == "triton":
        if not HAS_TRITON:
            return "triton"
        interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if x.is_cuda or interpreted else f"tensors on a CUDA device, got {x.device}"
    return None


@functools.cache
def _announce(op: str, name: str) -> None:
    _log.debug("%s uses the %s backend", op, name)
