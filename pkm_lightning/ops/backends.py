"""Which implementation of an op runs: named by the caller, or `auto`; chosen explicitly and logged once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
Implementation = TypeVar("Implementation", bound=Callable[..., object])


def choose_backend(op: str, backend: str, default: str, available: Mapping[str, Implementation]) -> Implementation:
    """The implementation of `op` that `backend` names; `auto` means `default`.

    Raises:
        ValueError: `backend` is not among `available`; the message lists them.
    """
    name = default if backend == "auto" else backend
    if name not in available:
        raise ValueError(f"{op}: backend={backend!r} is not available; allowed: auto, {', '.join(available)}.")
    if not torch.compiler.is_compiling():
        _announce(op, name)
    return available[name]


@functools.cache
def _announce(op: str, name: str) -> None:
    _log.debug("%s uses the %s backend", op, name)
