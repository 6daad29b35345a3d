"""Counts what was read, in place and without a word to the host: reads, weight and last step of every slot.

Letters: N slots, M = N + 1 counters, T tokens, C reads a token.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.ops.backends import HAS_NUMBA, choose_backend
from pkm_lightning.ops.count_reads.reference import WEIGHT_LIMIT, WEIGHT_UNIT, count_reads_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int, Int32, Int64
    from torch import Tensor

__all__ = ["WEIGHT_LIMIT", "WEIGHT_UNIT", "count_reads"]


def _count_reads_cpu(*arguments: object) -> None:
    _kernels().count_reads_cpu(*arguments)


@functools.cache
def _kernels() -> Any:
    """numba is imported where it is first needed."""
    return importlib.import_module("pkm_lightning.ops.count_reads.cpu")


_BACKENDS: dict[str, Callable[..., None]] = {"cpu": _count_reads_cpu, "reference": count_reads_reference}


def count_reads(
    counts_M: Int64[Tensor, " M"],
    weights_M: Int64[Tensor, " M"],
    last_M: Int32[Tensor, " M"],
    ids_TC: Int[Tensor, "T C"],
    weights_TC: Float[Tensor, "T C"],
    valid_T: Bool[Tensor, " T"] | None,
    step: int,
    *,
    backend: str = "auto",
) -> None:
    """Adds 1 to the count of every slot read and |weight| to its weight, and writes `step` as its last read.

    Weights are added in whole units of 2**-24, so that sums have no order: every backend, every split of the reads over
    calls and ranks and every run give the same bits. A NaN counts as 0, what is larger than 65,536 as that.

    The last counter is for what is no slot: padding and ids out of range. Its content means nothing.

    Args:
        counts_M, weights_M, last_M: the counters, contiguous, changed in place.
        ids_TC: slots read, int32 or int64.
        weights_TC: their weights, of any sign and any floating dtype.
        valid_T: False at padding, which is not counted; None: all tokens are real.
        step: number of the step, 0 to 2**31 - 1.
        backend: `auto`, `cpu` (numba) or `reference` (torch, any device).

    Raises:
        ValueError: ids, flags or counters of another dtype or shape, or an unknown backend or one that cannot run here.
    """
    if ids_TC.dtype not in (torch.int32, torch.int64) or ids_TC.ndim != 2 or ids_TC.shape != weights_TC.shape:
        raise ValueError(
            f"count_reads: ids are {ids_TC.dtype} of shape {tuple(ids_TC.shape)} and weights of shape "
            f"{tuple(weights_TC.shape)}; ids must be torch.int32 or torch.int64, both of one shape (T, C)."
        )
    if valid_T is not None and (valid_T.dtype is not torch.bool or valid_T.shape != ids_TC.shape[:1]):
        raise ValueError(
            f"count_reads: valid is {valid_T.dtype} of shape {tuple(valid_T.shape)}; give torch.bool of shape "
            f"{tuple(ids_TC.shape[:1])}, a flag for each row of ids, or None."
        )
    found = [(counter.dtype, counter.is_contiguous()) for counter in (counts_M, weights_M, last_M)]
    if found != [(torch.int64, True), (torch.int64, True), (torch.int32, True)]:
        raise ValueError(f"count_reads: counters must be contiguous int64, int64 and int32, got {found}.")
    default = "cpu" if counts_M.device.type == "cpu" and HAS_NUMBA else "reference"
    run = choose_backend("count_reads", backend, default, _BACKENDS, counts_M)
    run(counts_M, weights_M, last_M, ids_TC, weights_TC.detach(), valid_T, step)
