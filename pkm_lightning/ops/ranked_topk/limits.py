"""Dtypes and values of k that the ranking kernels take; the rest is left to torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import best_backend

if TYPE_CHECKING:
    from torch import Tensor

#: Largest k for which `auto` takes a kernel. On the CPU the kernel ranks by counting, which is quadratic in k and may
#: lose to a sort beyond (where exactly depends on k / L); a GPU program keeps its K best in registers, which run out.
LARGEST_K = {"cpu": 512, "triton": 128}
#: Dtypes of the kernels. The GPU kernels pack 32 bits of score and the index into 64 bits, so they take no float64.
EXACT = {"cpu": (torch.float32, torch.float64), "triton": (torch.float32,)}
#: Dtypes where the op widens half precision to float32, as it returns indices only.
WIDENED = {name: (*dtypes, torch.bfloat16, torch.float16) for name, dtypes in EXACT.items()}


def default_backend(x: Tensor, k: int, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> str:
    """Returns the backend that `auto` stands for: the best one here if it takes `k` and the dtype of `x`, else `eager`.

    Args:
        x: scores, or values of the same dtype on the same device.
        k: values to keep.
        dtypes: for each backend with kernels, the dtypes that it takes.
    """
    best = best_backend(x)
    return best if k <= LARGEST_K.get(best, 0) and x.dtype in dtypes.get(best, ()) else "eager"


def check_limits(op: str, backend: str, x: Tensor, k: int, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> None:
    """Checks that the backend the caller named has a kernel for the dtype of `x` and for `k`.

    Raises:
        ValueError: it has none; the message lists what it takes.
    """
    if backend in dtypes and x.dtype not in dtypes[backend]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[backend])
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: backend={backend!r} takes {allowed}, got {dtype}; use backend=eager, which takes any.")
    # The CPU kernel is correct for any k, only slower than a sort; it runs if it is named.
    if backend == "triton" and k > LARGEST_K["triton"]:
        raise ValueError(f"{op}: backend='triton' takes k up to {LARGEST_K['triton']}, got {k}; use backend=eager.")
