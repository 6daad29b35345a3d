"""Norms and squares of the rows' gradients, and tables whose columns lie on several ranks.

Letters: N rows, V values per row, U rows that were read.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from row_reads import BACKENDS, dense, device_of, on_the_cpu, padded, read
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops.row_update import (
    RowGradient,
    RowRule,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_gradient_dots,
    row_gradient_norm,
    row_gradient_squares,
    row_update,
)

CASES = [
    *((backend, dtype) for backend in BACKENDS for dtype in (torch.float32, torch.bfloat16)),
    *((backend, torch.float64) for backend in ("eager", "reference")),
]
# Rows, columns, reads: repeated rows, a hot row of several pieces, several blocks of columns, nothing read.
SIZES = [(13, 7, 30), (1, 3, 150), (5, 257, 6), (40, 6, 0), (90, 16, 150)]


def columns(gradient: RowGradient, part: slice) -> RowGradient:
    return gradient._replace(source_rows_XV=gradient.source_rows_XV[:, part])


def split(dim: int, n_parts: int) -> list[slice]:
    """Divides columns into ranges, of unequal width where they must be."""
    limits = [dim * part // n_parts for part in range(n_parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(limits)]


def table_and_state(n: int, v: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    sums = torch.promote_types(dtype, torch.float32)
    return torch.randn(n, v).to(device, dtype), {"sum": torch.rand(n).to(device, sums)}


def adagrad(seed: int = 77) -> tuple[RowRule, UpdateStep]:
    return find_rule("row_adagrad")(eps=1e-6), UpdateStep(lr=0.1, weight_decay=0.2, seed=seed)


def check_update(gradient: RowGradient, means_U: Tensor, backend: str) -> None:
    """Checks that with given means `backend` updates table and state as the reference does on the CPU."""
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
def test_squares_norms_and_updates_by_given_means(backend: str, dtype: torch.dtype) -> None:
    for n, v, reads in SIZES:
        gradient = read(n, v, reads, dtype, device_of(backend))
        rows_U, grad_NV = gradient.segments.rows_U.cpu(), dense(gradient)
        squares_U = row_gradient_squares(gradient, backend=backend)
        assert squares_U.dtype is gradient.coefficients_L.dtype
        assert_close(squares_U.cpu(), torch.where(rows_U >= 0, grad_NV.square().sum(-1)[rows_U.clamp(min=0)], 0.0))
        assert_close(row_gradient_norm(gradient, backend=backend).cpu(), grad_NV.norm())
        # Other numbers than the rows' own means, so that a backend that uses those fails.
        check_update(gradient, torch.rand(len(rows_U)).to(gradient.coefficients_L), backend)


@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case[0] != "triton"])
def test_dots_are_the_gradients_of_the_coefficients(backend: str, dtype: torch.dtype) -> None:
    for n, v, reads in SIZES:
        gradient, table_NV = read(n, v, reads, dtype), torch.randn(n, v).to(dtype)
        table_NV[torch.ones(n, dtype=torch.bool).index_fill(0, gradient.segments.rows_U.long(), False)] = torch.nan
        ids_L = torch.empty(reads, dtype=torch.int64)
        ids_L[gradient.segments.order_L] = gradient.segments.rows_U.long().repeat_interleave(
            gradient.segments.starts_Z.diff()
        )
        expected_L = (table_NV[ids_L].double() * gradient.source_rows_XV[gradient.sources_L.long()].double()).sum(-1)
        dots_L = row_gradient_dots(table_NV, gradient, backend=backend)
        assert dots_L.dtype is gradient.coefficients_L.dtype
        assert_close(dots_L, expected_L, kind="grad")
        # The norm takes what that pass has left.
        assert_close(row_gradient_norm(gradient, backend=backend), dense(gradient).norm(), kind="grad")


def test_threads_change_no_bit() -> None:
    results: list[list[Tensor]] = []
    for threads in (1, 2):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            gradient, table_NV = read(200, 33, 900), torch.randn(200, 33)
            results.append([row_gradient_dots(table_NV, gradient), row_gradient_squares(gradient)])
            for rule in (find_rule("lazy_adam")(), find_rule("factored_adam")(betas=(0.0, 0.9))):
                state = new_state(rule, table_NV)
                row_update(table_NV, gradient, rule, UpdateStep(lr=0.1), state)
                results[-1] += [table_NV.clone(), *state.values()]
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_adds_the_given_mean_times_the_square_of_scale() -> None:
    gradient = row_gradient(3, torch.tensor([2, 0, 2]), torch.ones(3), torch.tensor([0, 1, 1]), torch.eye(2))
    table_NV, state = torch.zeros(3, 2), {"sum": torch.ones(3)}
    rule, step = find_rule("row_adagrad")(eps=0.0), UpdateStep(lr=1.0)
    means_U = torch.tensor([6.0, 12.0])  # of rows 0 and 2
    row_update(table_NV, gradient, rule, step, state, scale=0.5, mean_squares_U=means_U, backend="reference")
    assert_close(state["sum"], torch.tensor([1 + 6 / 4, 1.0, 1 + 12 / 4]))
    assert_close(table_NV, torch.tensor([[0.0, -0.5 / 2.5**0.5], [0.0, 0.0], [-0.25, -0.25]]))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_parts_of_the_columns_learn_what_the_whole_table_learns(backend: str, dtype: torch.dtype) -> None:
    dim, device = 10, device_of(backend)
    table_NV, state = table_and_state(7, dim, dtype, device)
    parts = [(part, table_NV[:, part].contiguous(), {"sum": state["sum"].clone()}) for part in split(dim, 3)]
    # Parts in bf16 are rounded by bits of their own: each update may part them from the whole table by a last bit.
    for seed in range(1 if dtype is torch.bfloat16 else 2):
        gradient, before_NV = read(7, dim, 20, dtype, device), table_NV.clone()
        shares = [row_gradient_squares(columns(gradient, part), backend=backend) for part, _, _ in parts]
        means_U = torch.stack(shares).sum(0) / dim
        for part, part_NV, sums in parts:
            local = columns(gradient, part), *adagrad(seed), sums
            row_update(part_NV, *local, scale=0.4, mean_squares_U=means_U, backend=backend)
        row_update(table_NV, gradient, *adagrad(seed), state, scale=0.4, backend=backend)
        assert not torch.equal(table_NV, before_NV)
    assert_close(torch.cat([part_NV for _, part_NV, _ in parts], -1), table_NV)
    for _, _, sums in parts:
        assert_close(sums["sum"], state["sum"])
        assert torch.equal(sums["sum"], parts[0][2]["sum"])  # the copies of the ranks must not drift apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_may_be_strided_and_belong_to_a_graph_and_padding_counts_for_nothing(backend: str) -> None:
    gradient = read(9, 5, 20, device=device_of(backend))
    means_2U = torch.rand(2, len(gradient.segments.rows_U), device=device_of(backend))
    for means_U in (means_2U.T.contiguous()[:, 1], means_2U[0].requires_grad_()):
        check_update(gradient, means_U, backend)
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
def test_means_of_padding_go_nowhere(backend: str, device: str) -> None:
    for reads in (3, 20):
        gradient = padded(read(9, 5, reads, device=device))
        check_update(gradient, torch.where(gradient.segments.rows_U >= 0, 0.5, torch.nan), backend)


@pytest.mark.parametrize("rule", ["row_adagrad", "lazy_adam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_step_shares_does_not_show(backend: str, rule: str) -> None:
    results = []
    for is_shared in (False, True):
        torch.manual_seed(0)
        gradient, chosen = read(4, 33, 150, device=device_of(backend)), find_rule(rule)()
        table_NV = torch.randn(4, 33).to(gradient.source_rows_XV)
        state = new_state(chosen, table_NV)
        norm = row_gradient_norm(gradient, backend=backend)
        if is_shared:
            # Ranks add their squares in place.
            row_gradient_squares(gradient, backend=backend).zero_()
            assert torch.equal(row_gradient_norm(gradient, backend=backend), norm)
        else:
            gradient = gradient._replace()
        for number in (1, 2):
            row_update(table_NV, gradient, chosen, UpdateStep(lr=0.1, number=number), state, backend=backend)
            gradient.coefficients_L.mul_(2)
        results.append(table_NV)
    assert torch.equal(*results)


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.ops.row_update.eager._CHUNK_VALUES", 12)
    gradient = read(20, 5, 30)
    assert_close(row_gradient_squares(gradient, backend="eager"), row_gradient_squares(gradient, backend="reference"))
    check_update(gradient, torch.rand(len(gradient.segments.rows_U)), "eager")


def test_refusals_name_the_argument() -> None:
    gradient = row_gradient(4, torch.tensor([0, 2, 3]), torch.ones(3), torch.zeros(3).long(), torch.ones(1, 3))
    table_NV, state = table_and_state(4, 3, torch.float32)
    for name in ("sgd", "lazy_adam", "catch_up_adam"):
        rule = find_rule(name)(betas=(0.0, 0.9))
        with pytest.raises(ValueError, match=rf"mean_squares_U is given to {name}, which needs none"):
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
    message = (
        r"the table is torch.float32 of shape \(4, 2\); the gradient needs a contiguous one of torch.float32, 4 rows"
    )
    with pytest.raises(ValueError, match=message):
        row_gradient_dots(table_NV[:, :2], gradient)
