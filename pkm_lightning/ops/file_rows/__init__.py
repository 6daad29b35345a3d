"""Rows of a table in a file, read one by one into memory, so that the table itself never is.

Letters: U rows to read, Z bytes per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import HAS_NUMBA, choose_backend, load_kernels
from pkm_lightning.ops.file_rows.reference import read_rows_reference
from pkm_lightning.ops.segments import check_indices

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int64, UInt8
    from torch import Tensor

__all__ = ["read_file_rows"]


def _read_rows_cpu(*arguments: object) -> None:
    load_kernels("file_rows", "cpu").read_rows_cpu(*arguments)


_BACKENDS: dict[str, Callable[..., None]] = {"cpu": _read_rows_cpu, "reference": read_rows_reference}


def read_file_rows(
    descriptor: int,
    start: int,
    n_rows: int,
    ids_U: Int64[Tensor, " U"],
    out_UZ: UInt8[Tensor, "U Z"],
    *,
    backend: str = "auto",
) -> None:
    """Fills row u of `out` with the bytes of row ids[u] of the table that begins at byte `start` of a file.

    The interpreter is released while the kernel reads, so that threads may share the rows of one call.

    Args:
        descriptor: of a file that is open for reading.
        start: byte at which row 0 begins.
        n_rows: rows of the table, each of Z bytes.
        ids_U: rows to read, on the CPU; in ascending order a disk has the least work.
        out_UZ: contiguous, on the CPU.
        backend: `auto`, `cpu` (numba) or `reference` (Python).

    Raises:
        ValueError: an id is out of range, or the dtype or layout of a tensor is wrong.
        OSError: a row cannot be read.
        EOFError: the file ends before a row does.
    """
    if ids_U.dtype is not torch.int64 or out_UZ.dtype is not torch.uint8 or not out_UZ.is_contiguous():
        raise ValueError(
            f"read_file_rows: ids are {ids_U.dtype} and rows {out_UZ.dtype}; pass torch.int64, and torch.uint8 that is "
            "contiguous."
        )
    check_indices("read_file_rows", "ids", ids_U, n_rows)
    implementation = choose_backend("read_file_rows", backend, "cpu" if HAS_NUMBA else "reference", _BACKENDS, ids_U)
    implementation(descriptor, start, ids_U, out_UZ)
