"""file_rows in Python: one system call per row.

Letters: U rows to read, Z bytes per row.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def read_rows_reference(descriptor: int, start: int, ids_U: Tensor, out_UZ: Tensor) -> None:
    """Computes `read_file_rows`."""
    length = out_UZ.shape[1]
    for row_Z, row in zip(out_UZ.numpy(), ids_U.tolist(), strict=True):
        done = 0
        while done < length:
            count = os.preadv(descriptor, [row_Z[done:]], start + row * length + done)
            if count == 0:
                raise EOFError(f"the file ends before row {row}")
            done += count
