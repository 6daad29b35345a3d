"""Tables whose columns are spread: the squares of the rows' gradients.

Letters: N rows, D values a row, L reads, X source rows, U rows touched.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.ops.row_update import RowGradient, row_gradient, row_gradient_squares
from pkm_lightning.ops.segments import Segments

BACKENDS = ["eager", "cpu", "triton", "reference"]
CASES = [
    *((backend, dtype) for backend in BACKENDS for dtype in (torch.float32, torch.bfloat16)),
    *((backend, torch.float64) for backend in ("eager", "reference")),
]
# Rows, columns, reads: repeated rows, a hot row of several pieces, one column, several blocks of columns, nothing read.
SIZES = [(13, 7, 50), (1, 5, 300), (9, 1, 20), (5, 257, 30), (40, 6, 0)]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def read(n: int, d: int, reads: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> RowGradient:
    given = torch.randint(n, (reads,)), torch.randn(reads), torch.randint(5, (reads,)), torch.randn(5, d).to(dtype)
    return row_gradient(n, *(tensor.to(device) for tensor in given))


def on_the_cpu(gradient: RowGradient) -> RowGradient:
    n_rows, segments, *reads = gradient
    return RowGradient(n_rows, Segments(*(tensor.cpu() for tensor in segments)), *(tensor.cpu() for tensor in reads))


def padded(gradient: RowGradient) -> RowGradient:
    """The same gradient as an accelerator has it: room for more segments than there are."""
    order_L, rows_U, starts_V = gradient.segments
    pad, end = torch.nn.functional.pad, len(order_L)
    return gradient._replace(
        segments=Segments(order_L, pad(rows_U, (0, 3), value=-1), pad(starts_V, (0, 3), value=end))
    )


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("n", "d", "reads"), SIZES)
def test_squares_are_those_of_the_dense_gradient(n: int, d: int, reads: int, backend: str, dtype: torch.dtype) -> None:
    given = read(n, d, reads, dtype, device_of(backend))
    gradient = on_the_cpu(given)
    order_L, rows_U, starts_V = gradient.segments
    reads_LD = gradient.coefficients_L.double()[:, None] * gradient.source_rows_XD.double()[gradient.sources_L]
    ids_L = rows_U.repeat_interleave(starts_V.diff())
    dense_ND = torch.zeros(n, d, dtype=torch.float64).index_add_(0, ids_L, reads_LD[order_L])
    squares_U = row_gradient_squares(given, backend=backend)
    assert squares_U.dtype is gradient.coefficients_L.dtype
    assert_close(squares_U.cpu(), torch.where(rows_U >= 0, dense_ND.square().sum(-1)[rows_U.clamp(min=0)], 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_no_squares(backend: str) -> None:
    gradient = read(9, 5, 30, device=device_of(backend))
    squares_U = row_gradient_squares(padded(gradient), backend=backend)
    assert_close(squares_U[:-3].cpu(), row_gradient_squares(on_the_cpu(gradient), backend="reference"))
    assert not squares_U[-3:].any()
