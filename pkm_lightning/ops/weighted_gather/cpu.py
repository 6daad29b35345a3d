"""The weighted gather on the CPU: dot products in numba; the sums are ATen's, which nothing here beats.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read, X = T * G.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.segments import read_sources
from pkm_lightning.ops.weighted_gather import eager
from pkm_lightning.ops.weighted_gather.eager import gather_sum, table_gradient

__all__ = ["gather_dot", "gather_sum", "table_gradient"]


def gather_dot(table_ND: Tensor, rows_XD: Tensor, ids_TK: Tensor, groups_TK: Tensor | None, n_groups: int) -> Tensor:
    """See `eager.gather_dot`; in float32 for float32 and bfloat16 tables, other dtypes go through `eager`."""
    if table_ND.dtype not in (torch.float32, torch.bfloat16):
        return eager.gather_dot(table_ND, rows_XD, ids_TK, groups_TK, n_groups)
    dots_TK = torch.empty(ids_TK.shape)
    inputs = table_ND, rows_XD.float(), ids_TK.int(), read_sources(ids_TK, groups_TK, n_groups), dots_TK
    use_torch_threads()
    _dots(*map(_as_numpy, inputs))
    return dots_TK.to(table_ND.dtype)


def _as_numpy(values: Tensor) -> Any:
    """A view for numba kernels, which do not know bfloat16: its bits travel as uint16."""
    values = values.detach()
    # A tensor whose memory FSDP2 takes back after use must not be seen by `.numpy()`, which forbids that for good.
    return np.from_dlpack(values.view(torch.uint16) if values.dtype is torch.bfloat16 else values)


@intrinsic
def _widened(typing_context, value):  # type: ignore[no-untyped-def]
    """The float32 of a float32 or of the bits of a bfloat16; exact."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], context.get_value_type(types.uint32))
        shifted = builder.shl(bits, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(value), code


# Only a sum whose terms may be regrouped can be vectorised; the grouping is fixed when the kernel is compiled.
@numba.njit(nogil=True, cache=True, parallel=True, fastmath={"reassoc", "contract"})
def _dots(table_ND, rows_XD, ids_TK, sources_TK, dots_TK):  # type: ignore[no-untyped-def]
    for t in numba.prange(ids_TK.shape[0]):
        for k in range(ids_TK.shape[1]):
            row_D, source_D = table_ND[ids_TK[t, k]], rows_XD[sources_TK[t, k]]
            total = numba.float32(0)
            for d in range(row_D.shape[0]):
                total += _widened(row_D[d]) * source_D[d]
            dots_TK[t, k] = total
