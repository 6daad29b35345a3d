"""Rows of a file: every backend reads the bytes that NumPy reads; what cannot be read is an error.

Letters: N rows, U rows to read, Z bytes per row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stored_files import HUGE, write_huge

from pkm_lightning.ops.file_rows import read_file_rows

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "length", "ids"), [(0, 1, [0, 0, 6]), (5, 13, [6, 2, 3, 3, 0]), (4096, 320, [])])
def test_rows_are_those_of_the_file(tmp_path: Path, backend: str, start: int, length: int, ids: list[int]) -> None:
    rows_NZ = np.random.default_rng(0).integers(0, 256, (7, length), dtype=np.uint8)
    (tmp_path / "file").write_bytes(bytes(start) + rows_NZ.tobytes())
    out_UZ = torch.full((len(ids), length), 255, dtype=torch.uint8)
    with (tmp_path / "file").open("rb") as file:
        read_file_rows(file.fileno(), start, 7, torch.tensor(ids, dtype=torch.int64), out_UZ, backend=backend)
    assert np.array_equal(out_UZ.numpy(), rows_NZ[ids])


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_2_to_the_31(tmp_path: Path, backend: str) -> None:
    rows = [0, HUGE[0] // 2, HUGE[0] - 2, HUGE[0] - 1]
    written = {row: torch.randn(HUGE[1]).bfloat16() for row in rows}
    start = write_huge(tmp_path / "file", written)
    out_UV = torch.full((5, HUGE[1]), float("nan"), dtype=torch.bfloat16)
    with (tmp_path / "file").open("rb") as file:
        ids_U = torch.tensor([*rows, HUGE[0] - 3])
        read_file_rows(file.fileno(), start, HUGE[0], ids_U, out_UV.view(torch.uint8), backend=backend)
    assert torch.equal(out_UV, torch.stack([*written.values(), torch.zeros(HUGE[1], dtype=torch.bfloat16)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, backend: str) -> None:
    (tmp_path / "file").write_bytes(bytes(25))
    out_UZ = torch.zeros(2, 10, dtype=torch.uint8)
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(EOFError, match="the file ends before row 2"):
            read_file_rows(file.fileno(), 0, 3, torch.tensor([1, 2]), out_UZ, backend=backend)
        with pytest.raises(ValueError, match="ids has 3; allowed: 0 to 2"):
            read_file_rows(file.fileno(), 0, 3, torch.tensor([1, 3]), out_UZ, backend=backend)
        with pytest.raises(ValueError, match=r"ids are torch\.int32"):
            read_file_rows(file.fileno(), 0, 3, torch.tensor([1, 2]).int(), out_UZ, backend=backend)
        descriptor = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_file_rows(descriptor, 0, 3, torch.tensor([1, 2]), out_UZ, backend=backend)
