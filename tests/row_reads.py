"""Reads of a step, as gradients of a table in factored form, for the tests of the row operations.

Letters: N rows, V values per row, L reads, X source rows, U segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.row_update import RowGradient, row_gradient
from pkm_lightning.ops.segments import Segments

BACKENDS = ["eager", "cpu", "triton", "reference"]


def device_of(backend: str) -> str:
    """Returns where a backend is tested: Triton's kernels run on a GPU, or interpreted on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def read(
    n: int, v: int, reads: int, dtype: torch.dtype = torch.float32, device: str = "cpu", *, row: int | None = None
) -> RowGradient:
    """Returns the gradient of `reads` random reads, or of reads of the one row `row`."""
    ids_L = torch.randint(n, (reads,)) if row is None else torch.full((reads,), row)
    parts = ids_L, torch.randn(reads), torch.randint(5, (reads,)), torch.randn(5, v).to(dtype)
    return row_gradient(n, *(part.to(device) for part in parts))


def on_the_cpu(gradient: RowGradient) -> RowGradient:
    """Returns the same gradient on the CPU, with whatever padding it has."""
    n_rows, segments, *reads = gradient
    return RowGradient(n_rows, Segments(*(part.cpu() for part in segments)), *(part.cpu() for part in reads))


def padded(gradient: RowGradient) -> RowGradient:
    """Returns the same gradient as an accelerator has it: with room for more segments than there are."""
    order_L, rows_U, starts = gradient.segments
    pad, end = torch.nn.functional.pad, len(order_L)
    return gradient._replace(segments=Segments(order_L, pad(rows_U, (0, 3), value=-1), pad(starts, (0, 3), value=end)))


def dense(gradient: RowGradient) -> Tensor:
    """Returns the gradient as N x V numbers in float64, on the CPU."""
    n_rows, (order_L, rows_U, starts), coefficients_L, sources_L, rows_XV = on_the_cpu(gradient)
    reads_LV = coefficients_L.double()[:, None] * rows_XV.double()[sources_L]
    ids_L = rows_U.repeat_interleave(starts.diff())
    grad_NV = torch.zeros(n_rows, rows_XV.shape[1], dtype=torch.float64)
    return grad_NV.index_add_(0, ids_L, reads_LV[order_L])
