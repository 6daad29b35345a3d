"""weighted_gather on the CPU: inner products by a numba kernel; sums by ATen, whose embedding bag is as fast.

Letters: G groups per token, X = T * G upstream rows.
"""

from __future__ import annotations

import numba
import torch
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_intrinsics import widened
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.segments import read_sources
from pkm_lightning.ops.weighted_gather import eager
from pkm_lightning.ops.weighted_gather.eager import gather_sum, table_gradient

__all__ = ["gather_dot", "gather_sum", "table_gradient"]


def gather_dot(table_NV: Tensor, rows_XV: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """Computes `eager.gather_dot`, summed in float32, for float32 and bfloat16 tables; other dtypes go to `eager`."""
    if table_NV.dtype not in (torch.float32, torch.bfloat16):
        return eager.gather_dot(table_NV, rows_XV, ids_TK, groups_TK, n_groups)
    dots_TK = torch.empty(ids_TK.shape, dtype=torch.float32)
    # There are far fewer upstream rows than the T * K table rows to read, so widening a copy of them costs little.
    inputs = table_NV, rows_XV.float(), ids_TK.int(), read_sources(ids_TK, groups_TK, n_groups), dots_TK
    use_torch_threads()
    _dots(*map(numpy_view, inputs), ALL)
    return dots_TK.to(table_NV.dtype)


# The compiler vectorises a float sum only if it may regroup the terms (`reassoc`). It does so once, when it compiles
# the kernel, so that results do not change from run to run. `contract` allows fused multiply-adds; the other fast-math
# flags, which assume that no value is NaN or infinite, stay off.
@numba.njit(**KERNEL, fastmath={"reassoc", "contract"})
def _dots(table_NV, rows_XV, ids_TK, sources_TK, dots_TK, worker):  # type: ignore[no-untyped-def]
    first, last = share(ids_TK.shape[0], worker)
    for t in range(first, last):
        for k in range(ids_TK.shape[1]):
            row_V, source_V = table_NV[ids_TK[t, k]], rows_XV[sources_TK[t, k]]
            total = numba.float32(0)
            for v in range(row_V.shape[0]):
                total += widened(row_V[v]) * source_V[v]
            dots_TK[t, k] = total
