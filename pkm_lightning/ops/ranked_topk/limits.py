"""What the kernels that rank scores take; what they do not take is left to torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend

if TYPE_CHECKING:
    from torch import Tensor

#: Beyond it counting ranks may lose to a sort on the CPU (it is k over S that decides); a GPU program has no registers.
LARGEST_K = {"cpu": 512, "triton": 128}
#: The dtypes of the kernels where low precision is not taken as float32: GPU kernels pack 32 bits and a place.
EXACT = {"cpu": (torch.float32, torch.float64), "triton": (torch.float32,)}
#: The same where bf16 and fp16 are.
WIDENED = {name: (*dtypes, torch.bfloat16, torch.float16) for name, dtypes in EXACT.items()}


def default_backend(x: Tensor, k: int, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> str:
    """The backend that `auto` means: the best one here if its kernels take `k` and the dtype, else `eager`."""
    best = best_backend(x)
    return best if k <= LARGEST_K.get(best, 0) and x.dtype in dtypes.get(best, ()) else "eager"


def check_limits(op: str, backend: str, x: Tensor, k: int, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> None:
    """Raises ValueError where the named backend has no kernel for this dtype or this many."""
    if backend in dtypes and x.dtype not in dtypes[backend]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[backend])
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: backend={backend!r} takes {allowed}, got {got}; use backend=eager, which takes any.")
    if backend == "triton" and k > LARGEST_K["triton"]:
        raise ValueError(f"{op}: backend='triton' takes k up to {LARGEST_K['triton']}, got {k}; use backend=eager.")
