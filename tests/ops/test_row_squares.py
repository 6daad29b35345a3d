"""Tables whose columns are spread: squares of the rows' gradients, and updates that are told the mean of whole rows.

Letters: N rows, V values per row, L reads, X source rows, U rows touched.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops.row_update import (
    RowGradient,
    RowRule,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_gradient_squares,
    row_update,
)
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
    order_L, rows_U, starts_M = gradient.segments
    pad, end = torch.nn.functional.pad, len(order_L)
    return gradient._replace(
        segments=Segments(order_L, pad(rows_U, (0, 3), value=-1), pad(starts_M, (0, 3), value=end))
    )


def columns(gradient: RowGradient, part: slice) -> RowGradient:
    return gradient._replace(source_rows_XV=gradient.source_rows_XV[:, part])


def split(dim: int, n_parts: int) -> list[slice]:
    """Ranges of columns, of unequal width where they must be."""
    limits = [dim * part // n_parts for part in range(n_parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(limits)]


def table_and_state(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    sums = torch.promote_types(dtype, torch.float32)
    return torch.randn(n, d).to(device, dtype), {"sum": torch.rand(n).to(device, sums)}


def adagrad(seed: int = 77) -> tuple[RowRule, UpdateStep]:
    return find_rule("row_adagrad")(eps=1e-6), UpdateStep(lr=0.1, weight_decay=0.2, seed=seed)


def assert_same_update(gradient: RowGradient, means_U: Tensor, backend: str) -> None:
    """With the means given, `backend` moves table and state as the reference does on the CPU."""
    device, dtype = gradient.source_rows_XV.device.type, gradient.source_rows_XV.dtype
    table_NV, state = table_and_state(gradient.n_rows, gradient.source_rows_XV.shape[1], dtype, device)
    expected_NV, expected = table_NV.cpu().clone(), {"sum": state["sum"].cpu().clone()}
    scale = torch.tensor(0.375, device=device)  # exact in every dtype
    row_update(table_NV, gradient, *adagrad(), state, scale=scale, mean_squares_U=means_U, backend=backend)
    row_update(
        expected_NV, on_the_cpu(gradient), *adagrad(), expected,
        scale=0.375, mean_squares_U=means_U.cpu(), backend="reference",
    )  # fmt: skip
    assert_close(table_NV.cpu(), expected_NV)
    assert_close(state["sum"].cpu(), expected["sum"])


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("n", "d", "reads"), SIZES)
def test_squares_are_those_of_the_dense_gradient(n: int, d: int, reads: int, backend: str, dtype: torch.dtype) -> None:
    given = read(n, d, reads, dtype, device_of(backend))
    gradient = on_the_cpu(given)
    order_L, rows_U, starts_M = gradient.segments
    reads_LV = gradient.coefficients_L.double()[:, None] * gradient.source_rows_XV.double()[gradient.sources_L]
    ids_L = rows_U.repeat_interleave(starts_M.diff())
    dense_NV = torch.zeros(n, d, dtype=torch.float64).index_add_(0, ids_L, reads_LV[order_L])
    squares_U = row_gradient_squares(given, backend=backend)
    assert squares_U.dtype is gradient.coefficients_L.dtype
    assert_close(squares_U.cpu(), torch.where(rows_U >= 0, dense_NV.square().sum(-1)[rows_U.clamp(min=0)], 0.0))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("n", "d", "reads"), SIZES)
def test_a_given_mean_equals_the_reference(n: int, d: int, reads: int, backend: str, dtype: torch.dtype) -> None:
    gradient = read(n, d, reads, dtype, device_of(backend))
    # Other numbers than the rows' own means: a backend that forms those is found out.
    means_U = torch.rand(len(gradient.segments.rows_U)).to(gradient.coefficients_L)
    assert_same_update(gradient, means_U, backend)


def test_the_reference_adds_the_given_mean_times_the_square_of_scale() -> None:
    gradient = row_gradient(3, torch.tensor([2, 0, 2]), torch.ones(3), torch.tensor([0, 1, 1]), torch.eye(2))
    table_NV, state = torch.zeros(3, 2), {"sum": torch.ones(3)}
    rule = find_rule("row_adagrad")(eps=0.0), UpdateStep(lr=1.0)
    means_U = torch.tensor([6.0, 12.0])  # of rows 0 and 2
    row_update(table_NV, gradient, *rule, state, scale=0.5, mean_squares_U=means_U, backend="reference")
    assert_close(state["sum"], torch.tensor([1 + 6 / 4, 1.0, 1 + 12 / 4]))
    assert_close(table_NV, torch.tensor([[0.0, -0.5 / 2.5**0.5], [0.0, 0.0], [-0.25, -0.25]]))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("dim", "n_parts"), [(8, 2), (8, 4), (101, 4)])
def test_parts_of_the_columns_learn_what_the_whole_table_learns(
    dim: int, n_parts: int, backend: str, dtype: torch.dtype
) -> None:
    device = device_of(backend)
    table_NV, state = table_and_state(11, dim, dtype, device)
    parts = [(part, table_NV[:, part].contiguous(), {"sum": state["sum"].clone()}) for part in split(dim, n_parts)]
    # Parts in bf16 are rounded by bits of their own: each update may part them from the whole table by a last bit.
    for seed in range(1 if dtype is torch.bfloat16 else 3):
        gradient, before_NV = read(11, dim, 90, dtype, device), table_NV.clone()
        shares = [row_gradient_squares(columns(gradient, part), backend=backend) for part, _, _ in parts]
        means_U = torch.stack(shares).sum(0) / dim
        for part, part_NV, kept in parts:
            given = columns(gradient, part), *adagrad(seed), kept
            row_update(part_NV, *given, scale=0.4, mean_squares_U=means_U, backend=backend)
        row_update(table_NV, gradient, *adagrad(seed), state, scale=0.4, backend=backend)
        assert not torch.equal(table_NV, before_NV)
    assert_close(torch.cat([part_NV for _, part_NV, _ in parts], -1), table_NV)
    for _, _, kept in parts:
        assert_close(kept["sum"], state["sum"])
        assert torch.equal(kept["sum"], parts[0][2]["sum"])  # else ranks that hold it each for themselves drift apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_of_all_columns_are_what_an_update_forms_by_itself(backend: str) -> None:
    gradient = read(13, 7, 50, device=device_of(backend))
    table_NV, state = table_and_state(13, 7, torch.float32, device_of(backend))
    told_NV, told = table_NV.clone(), {"sum": state["sum"].clone()}
    means_U = row_gradient_squares(gradient, backend=backend) / 7
    row_update(table_NV, gradient, *adagrad(), state, scale=3.0, backend=backend)
    row_update(told_NV, gradient, *adagrad(), told, scale=3.0, mean_squares_U=means_U, backend=backend)
    assert_close(told_NV, table_NV)
    assert_close(told["sum"], state["sum"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_no_squares(backend: str) -> None:
    gradient = read(9, 5, 30, device=device_of(backend))
    squares_U = row_gradient_squares(padded(gradient), backend=backend)
    assert_close(squares_U[:-3].cpu(), row_gradient_squares(on_the_cpu(gradient), backend="reference"))
    assert not squares_U[-3:].any()


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("triton", device_of("triton")),
        *(pytest.param(backend, "cuda", marks=pytest.mark.gpu) for backend in ("reference", "eager")),
    ],
)
@pytest.mark.parametrize("reads", [3, 30])
def test_what_is_given_for_padding_goes_nowhere(reads: int, backend: str, device: str) -> None:
    gradient = padded(read(9, 5, reads, device=device))
    rows_U = gradient.segments.rows_U
    assert_same_update(gradient, torch.where(rows_U >= 0, 0.5, torch.nan), backend)


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.ops.row_update.eager._CHUNK_VALUES", 12)
    gradient = read(50, 5, 90)
    assert_close(row_gradient_squares(gradient, backend="eager"), row_gradient_squares(gradient, backend="reference"))
    assert_same_update(gradient, torch.rand(len(gradient.segments.rows_U)), "eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_means_may_be_strided_and_belong_to_a_graph(backend: str) -> None:
    gradient = read(13, 7, 50, device=device_of(backend))
    means_2U = torch.rand(2, len(gradient.segments.rows_U), device=device_of(backend))
    for means_U in (means_2U.T.contiguous()[:, 1], means_2U[0].requires_grad_()):
        assert_same_update(gradient, means_U, backend)


def test_refusals_name_what_is_wrong() -> None:
    gradient = row_gradient(4, torch.tensor([0, 2, 3]), torch.ones(3), torch.zeros(3).long(), torch.ones(1, 3))
    table_NV, state = table_and_state(4, 3, torch.float32)
    for kind in ("sgd", "lazy_adam", "catch_up_adam"):
        rule = find_rule(kind)(betas=(0.0, 0.9))
        with pytest.raises(ValueError, match=rf"mean_squares_U is given to {kind}, which needs none"):
            row_update(
                table_NV, gradient, rule, UpdateStep(lr=0.1), new_state(rule, table_NV), mean_squares_U=torch.ones(3)
            )
    needed = r"on cpu; this gradient needs torch.float32 of shape \(3,\) on cpu"
    with pytest.raises(ValueError, match=rf"mean_squares_U is torch.float32 of shape \(4,\) {needed}"):
        row_update(table_NV, gradient, *adagrad(), state, mean_squares_U=torch.ones(4))
    with pytest.raises(ValueError, match=rf"mean_squares_U is torch.float64 of shape \(3,\) {needed}"):
        row_update(table_NV, gradient, *adagrad(), state, mean_squares_U=torch.ones(3).double())
    wide = gradient._replace(source_rows_XV=torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"backend='cpu' sums in float32; use backend=eager for float64"):
        row_gradient_squares(wide, backend="cpu")
    with pytest.raises(ValueError, match=r"backend='cuda' is not available; allowed: auto, eager"):
        row_gradient_squares(gradient, backend="cuda")
