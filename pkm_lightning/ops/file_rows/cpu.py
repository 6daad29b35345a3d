"""file_rows by numba: the loop over rows calls the system without Python in between.

Letters: U rows to read, Z bytes per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
from numba.core import types

from pkm_lightning.ops.file_rows.reference import read_rows_reference
from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import KERNEL

if TYPE_CHECKING:
    from torch import Tensor

# By its name in the C library, which a cached kernel can look up again; a ctypes pointer could not be cached.
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))


def read_rows_cpu(descriptor: int, start: int, ids_U: Tensor, out_UZ: Tensor) -> None:
    """Computes `read_file_rows`."""
    done = _read(numba.int32(descriptor), start, numpy_view(ids_U), numpy_view(out_UZ))
    if done < len(ids_U):
        # The kernel cannot see `errno`: the rest, where an interrupted call is repeated and an error has its name.
        read_rows_reference(descriptor, start, ids_U[done:], out_UZ[done:])


@numba.njit(**KERNEL)
def _read(descriptor, start, ids_U, out_UZ):  # type: ignore[no-untyped-def]
    """Returns the number of rows that were read whole."""
    length = out_UZ.shape[1]
    for u in range(ids_U.shape[0]):
        # int64: a file may be larger than 2**31 bytes.
        got = _pread(descriptor, out_UZ[u].ctypes.data, length, start + ids_U[u] * length)
        if got != length:
            return u
    return ids_U.shape[0]
