"""Every backend of row_gradients against a loop: compact and dense, hot rows, empty segments, half precision.

Letters: L reads, N rows of the table, X source rows, V values per row, U segments.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops.row_gradients import row_gradients
from pkm_lightning.ops.segments import Segments, read_segments

BACKENDS = ["triton", "eager"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows, values per row, source rows, reads.
SIZES = [(6, 7, 3, 9), (9, 1, 1, 1), (1, 3, 4, 5), (4, 257, 2, 5), (40, 63, 50, 7)]


class Sum(NamedTuple):
    ids_L: Tensor
    coefficients_L: Tensor
    sources_L: Tensor
    rows_XV: Tensor

    def by_definition(self, n_rows: int) -> Tensor:
        grads_NV = torch.zeros(n_rows, self.rows_XV.shape[1], dtype=torch.float64)
        for row, coefficient, source in zip(*(part.cpu() for part in self[:3]), strict=True):
            grads_NV[row] += coefficient.double() * self.rows_XV[source].cpu().double()
        return grads_NV


def draw(n: int, d: int, x: int, length: int, dtype: torch.dtype, backend: str) -> Sum:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    coefficients_L = torch.rand(length).to(device, dtype)
    ids_L, sources_L = torch.randint(n, (length,), device=device), torch.randint(x, (length,), device=device)
    return Sum(ids_L, coefficients_L, sources_L.int(), torch.randn(x, d).to(device, dtype))


def dense(segments: Segments, case: Sum, n_rows: int, backend: str) -> Tensor:
    kernels = importlib.import_module(f"pkm_lightning.ops.row_gradients.{backend}")
    table_NV: Tensor = kernels.table_gradient(segments, *case[1:], n_rows)
    return table_NV


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_equal_the_definition_and_are_wide(dtype: torch.dtype, backend: str) -> None:
    for n, *sizes in SIZES if dtype in (torch.float32, torch.bfloat16) else SIZES[:2]:
        case = draw(n, *sizes, dtype, backend)
        segments = read_segments(case.ids_L, n)
        grads_UV = row_gradients(segments, *case[1:], backend=backend)
        expected_NV = case.by_definition(n)
        assert grads_UV.dtype is torch.promote_types(dtype, torch.float32)
        live_U = segments.rows_U.cpu() >= 0
        assert_close(grads_UV.cpu()[live_U], expected_NV[segments.rows_U.cpu()[live_U].long()], kind="grad")
        assert not grads_UV.cpu()[~live_U].any()
        if backend != "reference":
            table_NV = dense(segments, case, n, backend)
            assert table_NV.dtype is dtype
            assert_close(table_NV.cpu(), expected_NV, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_hot_rows_are_summed_in_pieces_and_alike_on_every_run(backend: str) -> None:
    case = draw(3, 5, 30, 150, torch.float32, backend)
    case = case._replace(ids_L=torch.where(case.ids_L == 0, 1, case.ids_L), coefficients_L=case.coefficients_L / 30)
    for ids_L in (case.ids_L, torch.ones_like(case.ids_L)):
        hot = case._replace(ids_L=ids_L)
        segments = read_segments(ids_L, 3)
        first_UV, second_UV = (row_gradients(segments, *hot[1:], backend=backend) for _ in range(2))
        assert torch.equal(first_UV, second_UV)
        rows_U = ids_L.unique().cpu()
        assert_close(first_UV.cpu()[: len(rows_U)], hot.by_definition(3)[rows_U], kind="grad")


@pytest.mark.parametrize("short_of_a_piece", [None, 3, 2, 1])
def test_pieces_of_neighbours_share_no_place(short_of_a_piece: int | None) -> None:
    piece = importlib.import_module("pkm_lightning.ops.row_gradients.triton")._PIECE
    before = 0 if short_of_a_piece is None else piece - short_of_a_piece
    counts = torch.tensor([before, piece + 1, piece + 1, 2 * piece + 1, piece, 1, 3 * piece + 1, 2 * piece, piece + 2])
    case = draw(1, 3, 4, int(counts.sum()), torch.float32, "triton")
    case = case._replace(ids_L=torch.arange(9).repeat_interleave(counts)[torch.randperm(len(case.ids_L))])
    case = case._replace(ids_L=case.ids_L.to(case.rows_XV.device))
    segments = read_segments(case.ids_L, 9)
    grads_UV = row_gradients(segments, *case[1:], backend="triton")
    rows_U = segments.rows_U.cpu()
    assert_close(grads_UV.cpu()[rows_U >= 0], case.by_definition(9)[rows_U[rows_U >= 0].long()], kind="grad")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty_segments_give_zeros_and_touch_no_row(backend: str) -> None:
    case = draw(1, 3, 2, 3, torch.float32, backend)._replace(ids_L=torch.tensor([5, 1, 5]))
    order_L, rows_U, starts_Z = read_segments(case.ids_L, 6)
    segments = Segments(
        order_L, torch.cat([rows_U, -torch.ones_like(rows_U)]), torch.nn.functional.pad(starts_Z, (0, 2), value=3)
    )
    segments = Segments(*(part.to(case.rows_XV.device) for part in segments))
    expected_NV = case.by_definition(6)
    grads_UV = row_gradients(segments, *case[1:], backend=backend)
    assert_close(grads_UV.cpu(), expected_NV[[1, 5, 0, 0]].float(), kind="grad")
    if backend != "reference":
        assert_close(dense(segments, case, 6, backend).cpu(), expected_NV, kind="grad")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_reads_and_strided_inputs(backend: str) -> None:
    case = draw(6, 8, 4, 20, torch.float32, backend)
    segments = read_segments(case.ids_L, 6)
    strided = case.coefficients_L.repeat_interleave(2)[::2], case.sources_L.long(), case.rows_XV.T.contiguous().T
    assert not strided[2].is_contiguous()
    expected_UV = row_gradients(segments, *case[1:], backend=backend)
    assert torch.equal(row_gradients(segments, *strided, backend=backend), expected_UV)
    none = read_segments(case.ids_L[:0], 6)
    assert row_gradients(none, *(part[:0] for part in case[1:3]), case.rows_XV, backend=backend).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hot_row_loses_nothing_to_the_dtype_of_the_table(backend: str, dtype: torch.dtype) -> None:
    case = draw(1, 3, 1, 400, dtype, backend)
    ones = case._replace(coefficients_L=torch.ones_like(case.coefficients_L), rows_XV=torch.ones_like(case.rows_XV))
    table_NV = dense(read_segments(ones.ids_L, 1), ones, 1, backend)
    assert table_NV.tolist() == [[400.0, 400.0, 400.0]]  # in bfloat16 256 + 1 is 256


def test_threads_do_not_change_the_sums() -> None:
    case = draw(50, 33, 20, 400, torch.float32, "eager")
    segments = read_segments(case.ids_L, 50)
    alone_UV = row_gradients(segments, *case[1:], backend="eager")
    torch.set_num_threads(2)
    try:
        assert torch.equal(row_gradients(segments, *case[1:], backend="eager"), alone_UV)
    finally:
        torch.set_num_threads(1)


def test_operator_is_registered_completely() -> None:
    case = draw(11, 7, 5, 15, torch.bfloat16, "eager")
    segments = read_segments(case.ids_L, 11)
    torch.set_deterministic_debug_mode("default")  # opcheck compares what is uninitialised
    library.opcheck(torch.ops.pkm_lightning.row_gradients.default, (*segments, *case[1:], "eager"))
    with FlopCounterMode(display=False) as counter:
        row_gradients(segments, *case[1:])
    assert counter.get_total_flops() == 2 * 15 * 7


def test_refuses_inputs_that_do_not_fit() -> None:
    case = draw(11, 7, 5, 15, torch.float32, "eager")
    segments = read_segments(case.ids_L, 11)
    with pytest.raises(
        ValueError, match=r"row_gradients: needs source rows \(X, V\) and one coefficient and one source"
    ):
        row_gradients(segments, case.coefficients_L[1:], case.sources_L, case.rows_XV)
    with pytest.raises(ValueError, match=r"sources are torch.int16; allowed: torch.int32, torch.int64\."):
        row_gradients(segments, case.coefficients_L, case.sources_L.short(), case.rows_XV)
