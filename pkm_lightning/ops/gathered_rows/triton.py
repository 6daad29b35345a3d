"""gathered_rows on a GPU: each program copies a tile of rows, many of them where rows are narrow.

Letters: L reads; suffixes in the kernel: R reads and C columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import ROWS, TABLES, TOKENS, ids
from pkm_lightning.ops.gathered_rows import eager
from pkm_lightning.ops.row_gradients.triton import table_gradient

__all__ = ["gather", "launch_examples", "table_gradient"]

#: Values of a tile, 16 per thread: each thread has several 128-bit loads of random rows under way.
_TILE = 2048
#: Most columns of a tile.
_COLUMNS = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather(table_NV: Tensor, ids_L: Tensor) -> Tensor:
    """Computes `eager.gather`; float64 goes to `eager`."""
    if table_NV.dtype not in _DTYPES:
        return eager.gather(table_NV, ids_L)
    reads, dim = len(ids_L), table_NV.shape[1]
    rows_LV = table_NV.new_empty(reads, dim)
    sizes = _sizes(dim)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(table_NV):
        _copy_rows[triton.cdiv(reads, sizes["BLOCK_R"]), triton.cdiv(dim, sizes["BLOCK_V"])](
            table_NV, ids_L, rows_LV, reads, **sizes
        )
    return rows_LV


def _sizes(dim: int) -> dict[str, int]:
    """Returns the compile-time constants: tiles whose width divides the row, if that leaves whole cache lines."""
    width = dim & -dim  # the largest power of two that divides it
    columns = width if width >= 32 else triton.next_power_of_2(dim)
    columns = max(16, min(columns, _COLUMNS))
    return {"V": dim, "BLOCK_R": _TILE // columns, "BLOCK_V": columns}


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    table, ids, rows, reads, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Copies BLOCK_V columns of BLOCK_R rows."""
    # int64: the offsets of large tables and outputs pass 2**31.
    read_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v_C = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_R = tl.load(ids + read_R, mask=read_R < reads, other=0).to(tl.int64)
    mask_RC = (read_R < reads)[:, None] & (v_C < V)[None, :]
    values_RC = tl.load(table + row_R[:, None] * V + v_C[None, :], mask=mask_RC)
    tl.store(rows + read_R[:, None] * V + v_C[None, :], values_RC, mask=mask_RC)


def launch_examples() -> None:
    """Launches the kernel: see `pkm_lightning.ops.example_tables`."""
    for dim, dtype in TABLES:
        gather(torch.empty(ROWS, dim, dtype=dtype), ids(TOKENS * 16))
