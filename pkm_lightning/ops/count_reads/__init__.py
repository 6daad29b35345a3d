"""Counters of the reads of every slot: how often, with how much weight and in which step last; updated in place.

Letters: M = N + 1 counters (N slots, one counter for everything else), C reads per token, of all heads together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import HAS_NUMBA, choose_backend, load_kernels
from pkm_lightning.ops.count_reads.reference import WEIGHT_LIMIT, WEIGHT_UNIT, count_reads_reference
from pkm_lightning.ops.segments import INDEX_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int, Int32, Int64
    from torch import Tensor

__all__ = ["WEIGHT_LIMIT", "WEIGHT_UNIT", "count_reads"]


def _count_reads_cpu(*arguments: object) -> None:
    load_kernels("count_reads", "cpu").count_reads_cpu(*arguments)


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
    """Adds 1 to the count of every slot that is read and |weight| to its weight, and sets its last step to `step`.

    Weights are added as integers, in units of 2**-24, so that the order of additions does not matter: every backend,
    every run and every split of the reads over calls and ranks gives the same bits. A NaN counts as 0, a weight above
    65,536 as 65,536. No shape depends on values, and the host does not wait for the device.

    The last counter collects what is no slot, padding and ids out of range; its value is undefined.

    Args:
        counts_M, weights_M, last_M: the counters, contiguous, changed in place.
        ids_TC: slots that are read, int32 or int64.
        weights_TC: weights of the reads, of any sign and any floating dtype.
        valid_T: False at padding tokens, which are not counted; None if all tokens count.
        step: number of the step, 0 to 2**31 - 1.
        backend: `auto`, `cpu` (numba) or `reference` (torch, any device).

    Raises:
        ValueError: the dtype or shape of ids, flags or counters is wrong, or the backend is unknown or cannot run here.
    """
    if ids_TC.dtype not in INDEX_DTYPES or ids_TC.ndim != 2 or ids_TC.shape != weights_TC.shape:
        raise ValueError(
            f"count_reads: ids are {ids_TC.dtype} of shape {tuple(ids_TC.shape)} and weights of shape "
            f"{tuple(weights_TC.shape)}; ids must be torch.int32 or torch.int64, both of one shape (T, C)."
        )
    if valid_T is not None and (valid_T.dtype is not torch.bool or valid_T.shape != ids_TC.shape[:1]):
        raise ValueError(
            f"count_reads: valid is {valid_T.dtype} of shape {tuple(valid_T.shape)}; pass torch.bool of shape "
            f"{tuple(ids_TC.shape[:1])}, one flag per row of ids, or None."
        )
    layouts = [(counter.dtype, counter.is_contiguous()) for counter in (counts_M, weights_M, last_M)]
    if layouts != [(torch.int64, True), (torch.int64, True), (torch.int32, True)]:
        raise ValueError(f"count_reads: counters must be contiguous int64, int64 and int32, got {layouts}.")
    default = "cpu" if counts_M.device.type == "cpu" and HAS_NUMBA else "reference"
    implementation = choose_backend("count_reads", backend, default, _BACKENDS, counts_M)
    implementation(counts_M, weights_M, last_M, ids_TC, weights_TC.detach(), valid_T, step)
